"""Full matrices."""

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._base import AbstractTransitions


# Products of matrices up to this size are written out as sums of elementwise products, which XLA fuses with their
# neighbours; a batched matrix product of that size is mostly launch and padding.
_LARGEST_UNROLLED_SIZE = 8


def matrix_vector(A: Float[Array, "*batch D D"], d: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """`A d` for a batch of each."""
    size = A.shape[-1]
    if size <= _LARGEST_UNROLLED_SIZE:
        return sum((A[..., k] * d[..., k, None] for k in range(1, size)), A[..., 0] * d[..., 0, None])
    # The default precision on a GPU is that of ten bits.
    return jnp.einsum("...jk,...k->...j", A, d, precision=lax.Precision.HIGHEST)


def matrix_matrix(A: Float[Array, "*#batch D D"], B: Float[Array, "*#batch D K"]) -> Float[Array, "*batch D K"]:
    """`A B` for a batch of each, or of one."""
    size = A.shape[-1]
    if size <= _LARGEST_UNROLLED_SIZE:
        products = (A[..., :, k, None] * B[..., k, None, :] for k in range(size))
        total = next(products)
        for product in products:
            total = total + product
        return total
    return jnp.matmul(A, B, precision=lax.Precision.HIGHEST)


def clip_diagonal(A: Float[Array, "*batch D D"], limit: float) -> Float[Array, "*batch D D"]:
    """`A` with its diagonal clipped."""
    return jnp.where(jnp.eye(A.shape[-1], dtype=bool), jnp.clip(A, -limit, limit), A)


class DenseTransitions(AbstractTransitions):
    """Full matrices. `N D^2` memory; `N D^3` work for a composition of all.

    **Arguments:**

    - `A`: the matrices, shape `(N, D, D)`.
    """

    A: Float[Array, "*N D D"]

    def apply(self, d):
        return matrix_vector(self.A, d)

    def after(self, first):
        return DenseTransitions(matrix_matrix(self.A, first.A))

    def transposed(self):
        return DenseTransitions(jnp.swapaxes(self.A, -1, -2))

    def clipped(self, limit):
        return DenseTransitions(clip_diagonal(self.A, limit))

    def dense(self):
        return self.A

    def blocks(self):
        return self.A[..., None, :, :]

    def split(self, d):
        return d[..., None, :]

    def join(self, parts):
        return parts[..., 0, :]
