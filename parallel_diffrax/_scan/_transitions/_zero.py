"""No dependence on the step before."""

import equinox as eqx
import jax.numpy as jnp

from ._base import AbstractTransitions


class ZeroTransitions(AbstractTransitions):
    """`A[i] = 0`: nothing to compose, nothing to store, nothing to scan.

    **Arguments:**

    - `num_steps`: `N`.
    - `size`: `D`.
    - `dtype`: of the matrices.
    """

    num_steps: int = eqx.field(static=True)
    size: int = eqx.field(static=True)
    dtype: jnp.dtype = eqx.field(static=True)

    def apply(self, d):
        return jnp.zeros_like(d)

    def after(self, first):
        del first
        return self

    def evaluate(self, linear, r):
        del linear
        return r

    def finite(self):
        return jnp.ones(self.num_steps, bool)

    def transposed(self):
        return self

    def clipped(self, limit):
        del limit
        return self

    def dense(self):
        return jnp.zeros((self.num_steps, self.size, self.size), self.dtype)

    def blocks(self):
        return jnp.zeros((self.num_steps, self.size, 1, 1), self.dtype)

    def split(self, d):
        return d[..., None]

    def join(self, parts):
        return parts[..., 0]
