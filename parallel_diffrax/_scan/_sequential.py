"""A linear recurrence evaluated one step after the other."""

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._base import AbstractScan


class SequentialScan(AbstractScan):
    """`jax.lax.scan`: `N` steps of depth 1. Least work; the oracle of the others.

    Work `N D^2` (dense) or `N D` (diagonal), depth `N`.
    """

    def solve(self, transitions, r, *, transpose=False):
        if transpose:
            transitions, r = jtu.tree_map(lambda x: jnp.flip(x, axis=0), (transitions.reversed(), r))

        def body(d, element):
            A, r = element
            d = A.apply(d) + r
            return d, d

        # The first coefficients multiply zero, and may be anything.
        _, rest = lax.scan(body, r[0], jtu.tree_map(lambda x: x[1:], (transitions, r)))
        d = jnp.concatenate([r[:1], rest])
        return jnp.flip(d, axis=0) if transpose else d
