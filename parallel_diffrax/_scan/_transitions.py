"""The coefficients `A` of a linear recurrence, in each structure that a method gives them."""

import abc

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


# Products of matrices up to this size are written out as sums of elementwise products, which XLA fuses with their
# neighbours; a batched matrix product of that size is mostly launch and padding.
_LARGEST_UNROLLED_SIZE = 8


def _shift_back(x: Float[Array, " N *rest"]) -> Float[Array, " N *rest"]:
    return jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])


class AbstractTransitions(eqx.Module):
    """The matrices `A[0], ..., A[N-1]` of `d[i] = A[i] d[i-1] + r[i]`, in some structure.

    The first axis of every array is time, so that `jax.tree.map(lambda a: a[i:j], transitions)` is a stretch of it.
    """

    @abc.abstractmethod
    def apply(self, d: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """`A[i] d[i]` for every `i`. Without the time axis on both: `A d`."""

    @abc.abstractmethod
    def after(self, first: "AbstractTransitions") -> "AbstractTransitions":
        """`self[i] @ first[i]` for every `i`: first `first`, then `self`."""

    @abc.abstractmethod
    def reversed(self) -> "AbstractTransitions":
        """The transitions of the transposed system: `A[i+1]^T` at `i`, zero at `N - 1`."""

    @abc.abstractmethod
    def where(self, mask: Bool[Array, " N"]) -> "AbstractTransitions":
        """These transitions where `mask` holds, zero elsewhere. Zeroes non-finite entries too."""

    @abc.abstractmethod
    def abs(self) -> "AbstractTransitions":
        """The magnitudes of all entries."""

    @abc.abstractmethod
    def finite(self) -> Bool[Array, " N"]:
        """Whether every entry of `A[i]` is finite."""

    @abc.abstractmethod
    def dense(self) -> Float[Array, " N D D"]:
        """All matrices written out, at `N D^2` memory."""


class DenseTransitions(AbstractTransitions):
    """Full matrices. `N D^2` memory; `N D^3` work for a composition of all.

    **Arguments:**

    - `A`: the matrices, shape `(N, D, D)`.
    """

    A: Float[Array, "*N D D"]

    def apply(self, d):
        size = self.A.shape[-1]
        if size <= _LARGEST_UNROLLED_SIZE:
            return sum((self.A[..., k] * d[..., k, None] for k in range(1, size)), self.A[..., 0] * d[..., 0, None])
        return jnp.einsum("...jk,...k->...j", self.A, d, precision=lax.Precision.HIGHEST)

    def after(self, first):
        assert isinstance(first, DenseTransitions)
        A, B = self.A, first.A
        size = A.shape[-1]
        if size <= _LARGEST_UNROLLED_SIZE:
            products = (A[..., :, k, None] * B[..., k, None, :] for k in range(size))
            total = next(products)
            for product in products:
                total = total + product
            return DenseTransitions(total)
        return DenseTransitions(jnp.matmul(A, B, precision=lax.Precision.HIGHEST))

    def reversed(self):
        return DenseTransitions(_shift_back(jnp.swapaxes(self.A, -1, -2)))

    def where(self, mask):
        return DenseTransitions(jnp.where(mask[:, None, None], self.A, 0))

    def abs(self):
        return DenseTransitions(jnp.abs(self.A))

    def finite(self):
        return jnp.all(jnp.isfinite(self.A), axis=(-2, -1))

    def dense(self):
        return self.A


class DiagonalTransitions(AbstractTransitions):
    """Diagonal matrices. `N D` memory and work.

    **Arguments:**

    - `a`: the diagonals, shape `(N, D)`.
    """

    a: Float[Array, "*N D"]

    def apply(self, d):
        return self.a * d

    def after(self, first):
        assert isinstance(first, DiagonalTransitions)
        return DiagonalTransitions(self.a * first.a)

    def reversed(self):
        return DiagonalTransitions(_shift_back(self.a))

    def where(self, mask):
        return DiagonalTransitions(jnp.where(mask[:, None], self.a, 0))

    def abs(self):
        return DiagonalTransitions(jnp.abs(self.a))

    def finite(self):
        return jnp.all(jnp.isfinite(self.a), axis=-1)

    def dense(self):
        return self.a[..., None] * jnp.eye(self.a.shape[-1], dtype=self.a.dtype)
