"""Matrices of small diagonal blocks."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._base import AbstractTransitions
from ._dense import clip_diagonal, DenseTransitions, matrix_matrix, matrix_vector


class BlockDiagonalTransitions(AbstractTransitions):
    """Matrices that couple the components of a state in groups. `N D b` memory, `N D b^2` work for a composition of all.

    **Arguments:**

    - `A`: the blocks, shape `(N, B, b, b)`, `B b = D`.
    - `groups`: `B` tuples of the `b` components that each block acts on; together a permutation of `0 .. D-1`.
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
        # The components are sorted into their blocks once, and not at every composition.
        return self.join(linear(DenseTransitions(self.A), self.split(r)))
