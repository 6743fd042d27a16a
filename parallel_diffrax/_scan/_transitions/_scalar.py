"""Multiples of the identity."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._base import AbstractTransitions


class ScalarTransitions(AbstractTransitions):
    """Multiples of the identity. `N` memory and work, besides the right-hand side's.

    **Arguments:**

    - `a`: the multiples, shape `(N,)`.
    - `size`: `D`.
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
        return self.a[..., None, None] * jnp.eye(self.size, dtype=self.a.dtype)

    def blocks(self):
        return jnp.broadcast_to(self.a[..., None, None, None], (*self.a.shape, self.size, 1, 1))

    def split(self, d):
        return d[..., None]

    def join(self, parts):
        return parts[..., 0]
