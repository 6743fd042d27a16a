"""The structures of `A`: what multiplies the state of a linear recurrence."""

import abc
import functools
import operator
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float

from ._shifts import shift


_Transitions = TypeVar("_Transitions", bound="AbstractTransitions")


class AbstractTransitions(eqx.Module):
    """The matrices `A[0], ..., A[N-1]` of `d[i] = A[i] d[i-1] + r[i]`, in some structure.

    Every array of a structure has time as its first axis and is linear in `A`, so
    `jax.tree.map(lambda a: a[i:j], transitions)` is a segment of the sequence. A structure is closed under products. It
    consists of `B` diagonal blocks of equal size `b`, which `blocks`, `split` and `join` give access to: one block for full
    matrices, `D` blocks for diagonal ones.
    """

    @abc.abstractmethod
    def apply(self, d: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """`A[i] d[i]` for every `i`, or `A d` if neither has a time axis."""

    @abc.abstractmethod
    def after(self: _Transitions, first: _Transitions) -> _Transitions:
        """`self[i] @ first[i]` for every `i`."""

    @abc.abstractmethod
    def transposed(self: _Transitions) -> _Transitions:
        """`A[i]^T` at `i`."""

    @abc.abstractmethod
    def clipped(self: _Transitions, limit: float) -> _Transitions:
        """These transitions with the diagonal entries of every `A[i]` clipped to `[-limit, limit]`."""

    @abc.abstractmethod
    def dense(self) -> Float[Array, " N D D"]:
        """All matrices in full, in `N D^2` memory."""

    @abc.abstractmethod
    def blocks(self) -> Float[Array, "*N B b b"]:
        """The `B` diagonal blocks of size `b`."""

    @abc.abstractmethod
    def split(self, d: Float[Array, "*N D"]) -> Float[Array, "*N B b"]:
        """The entries of `d` on which each block acts."""

    @abc.abstractmethod
    def join(self, parts: Float[Array, "*N B b"]) -> Float[Array, "*N D"]:
        """The inverse of `split`."""

    def evaluate(self, linear: Callable, r: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """Evaluates a recurrence by `linear(transitions, r)`, with `A` and `r` in the form that is cheapest for a scan."""
        return linear(self, r)

    def reversed(self: _Transitions) -> _Transitions:
        """The transitions of the transposed system: `A[i+1]^T` at `i`, zero at `N - 1`."""
        return jtu.tree_map(lambda a: shift(a, -1), self.transposed())

    def where(self: _Transitions, mask: Bool[Array, " N"]) -> _Transitions:
        """These transitions where `mask` holds, zero elsewhere, also in place of non-finite entries."""
        return jtu.tree_map(lambda a: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, 0), self)

    def abs(self: _Transitions) -> _Transitions:
        """The magnitudes of all entries."""
        return jtu.tree_map(jnp.abs, self)

    def scaled(self: _Transitions, factor: float | Float[Array, ""]) -> _Transitions:
        """`factor A[i]` at `i`."""
        return jtu.tree_map(lambda a: factor * a, self)

    def finite(self) -> Bool[Array, " N"] | Bool[Array, ""]:
        """Whether every entry of `A[i]` is finite."""
        finite = jnp.array(True)
        for a in jtu.tree_leaves(self):
            finite = finite & jnp.all(jnp.isfinite(a), axis=tuple(range(1, a.ndim)))
        return finite


# Up to this size, matrix products are sums of elementwise products, which XLA fuses with adjacent operations. Batched
# matrix products of such sizes are mostly launch and padding.
_LARGEST_UNROLLED_SIZE = 8


def matrix_vector(A: Float[Array, "*batch D D"], d: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """`A d`, for a batch of both."""
    size = A.shape[-1]
    if size <= _LARGEST_UNROLLED_SIZE:
        return sum((A[..., k] * d[..., k, None] for k in range(1, size)), A[..., 0] * d[..., 0, None])
    # The default precision on a GPU is ten bits.
    return jnp.einsum("...jk,...k->...j", A, d, precision=lax.Precision.HIGHEST)


def matrix_matrix(A: Float[Array, "*#batch D D"], B: Float[Array, "*#batch D K"]) -> Float[Array, "*batch D K"]:
    """`A B`, for a batch of either or both."""
    rank, size = max(A.ndim, B.ndim), A.shape[-1]
    A, B = (x.reshape(*[1] * (rank - x.ndim), *x.shape) for x in (A, B))
    if size <= _LARGEST_UNROLLED_SIZE:
        products = (A[..., :, k, None] * B[..., k, None, :] for k in range(size))
        return functools.reduce(operator.add, products)
    return jnp.matmul(A, B, precision=lax.Precision.HIGHEST)


def clip_diagonal(A: Float[Array, "*batch D D"], limit: float) -> Float[Array, "*batch D D"]:
    """`A` with its diagonal clipped."""
    return jnp.where(jnp.eye(A.shape[-1], dtype=bool), jnp.clip(A, -limit, limit), A)


class DenseTransitions(AbstractTransitions):
    """Full matrices.

    **Arguments:** `A`, the matrices, shape `(N, D, D)`.

    **Cost:** memory `N D^2`; `N D^3` work to compose all.
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


class DiagonalTransitions(AbstractTransitions):
    """Diagonal matrices.

    **Arguments:** `a`, the diagonals, shape `(N, D)`.

    **Cost:** memory and work `N D`.
    """

    a: Float[Array, "*N D"]

    def apply(self, d):
        return self.a * d

    def after(self, first):
        return DiagonalTransitions(self.a * first.a)

    def transposed(self):
        return self

    def clipped(self, limit):
        return DiagonalTransitions(jnp.clip(self.a, -limit, limit))

    def dense(self):
        size = self.a.shape[-1]
        return self.a[..., None] * jnp.broadcast_to(jnp.eye(size, dtype=self.a.dtype), (*self.a.shape, size))

    def blocks(self):
        return self.a[..., None, None]

    def split(self, d):
        return d[..., None]

    def join(self, parts):
        return parts[..., 0]


class BlockDiagonalTransitions(AbstractTransitions):
    """Block-diagonal matrices, which couple the components of a state in groups.

    **Arguments:** `A`, the blocks, shape `(N, B, b, b)`, `B b = D`; `groups`, for each of the `B` blocks the tuple of the
    `b` components on which it acts. Together the tuples are a permutation of `0 .. D-1`.

    **Cost:** memory `N D b`; `N D b^2` work to compose all.
    """

    A: Float[Array, "*N B b b"]
    groups: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    def apply(self, d):
        return self.join(matrix_vector(self.A, self.split(d)))

    def after(self, first):
        return BlockDiagonalTransitions(matrix_matrix(self.A, first.A), self.groups)

    def transposed(self):
        return BlockDiagonalTransitions(jnp.swapaxes(self.A, -1, -2), self.groups)

    def clipped(self, limit):
        return BlockDiagonalTransitions(clip_diagonal(self.A, limit), self.groups)

    def dense(self):
        groups = np.asarray(self.groups)
        dense = jnp.zeros((*self.A.shape[:-3], groups.size, groups.size), self.A.dtype)
        return dense.at[..., groups[:, :, None], groups[:, None, :]].set(self.A)

    def blocks(self):
        return self.A

    def split(self, d):
        return d[..., np.asarray(self.groups)]

    def join(self, parts):
        order = np.argsort(np.asarray(self.groups).reshape(-1))
        return parts.reshape(*parts.shape[:-2], order.size)[..., order]

    def evaluate(self, linear, r):
        # This sorts the components into their blocks once, not at every composition.
        return self.join(linear(DenseTransitions(self.A), self.split(r)))


class ScalarTransitions(AbstractTransitions):
    """Multiples of the identity.

    **Arguments:** `a`, the multiples, shape `(N,)`; `size`, which is `D`.

    **Cost:** memory and work `N`, besides the right-hand side.
    """

    a: Float[Array, "*N"]
    size: int = eqx.field(static=True)

    def apply(self, d):
        return self.a[..., None] * d

    def after(self, first):
        return ScalarTransitions(self.a * first.a, self.size)

    def transposed(self):
        return self

    def clipped(self, limit):
        return ScalarTransitions(jnp.clip(self.a, -limit, limit), self.size)

    def dense(self):
        shape = (*self.a.shape, self.size, self.size)
        return self.a[..., None, None] * jnp.broadcast_to(jnp.eye(self.size, dtype=self.a.dtype), shape)

    def blocks(self):
        return jnp.broadcast_to(self.a[..., None, None, None], (*self.a.shape, self.size, 1, 1))

    def split(self, d):
        return d[..., None]

    def join(self, parts):
        return parts[..., 0]


class ZeroTransitions(AbstractTransitions):
    """`A[i] = 0`: no step depends on the one before.

    **Arguments:** `num_steps`, which is `N`; `size`, which is `D`; `dtype`, of the matrices.

    **Cost:** none. Nothing is stored, composed or scanned.
    """

    num_steps: int = eqx.field(static=True)
    size: int = eqx.field(static=True)
    dtype: jnp.dtype = eqx.field(static=True)

    def apply(self, d):
        return jnp.zeros_like(d)

    def after(self, first):
        return self

    def evaluate(self, linear, r):
        return r

    def finite(self):
        return jnp.ones(self.num_steps, bool)

    def transposed(self):
        return self

    def clipped(self, limit):
        return self

    def dense(self):
        return jnp.zeros((self.num_steps, self.size, self.size), self.dtype)

    def blocks(self):
        return jnp.zeros((self.num_steps, self.size, 1, 1), self.dtype)

    def split(self, d):
        return d[..., None]

    def join(self, parts):
        return parts[..., 0]
