"""Diagonal matrices."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._base import AbstractTransitions


class DiagonalTransitions(AbstractTransitions):
    """Diagonal matrices. `N D` memory and work.

    **Arguments:**

    - `a`: the diagonals, shape `(N, D)`.
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
        return self.a[..., None] * jnp.eye(self.a.shape[-1], dtype=self.a.dtype)

    def blocks(self):
        return self.a[..., None, None]

    def split(self, d):
        return d[..., None]

    def join(self, parts):
        return parts[..., 0]
