"""A linear recurrence evaluated one step after the other."""

import jax.lax as lax
import jax.numpy as jnp

from ._base import AbstractScan


class SequentialScan(AbstractScan):
    """`jax.lax.scan`: `N` steps of depth 1. Least work; the oracle of the others.

    Work `N D^2` (dense) or `N D` (diagonal), depth `N`.
    """

    def solve(self, transitions, r, *, transpose=False):
        if transpose:
            transitions = transitions.reversed()

        def body(d, element):
            A, r = element
            d = A.apply(d) + r
            return d, d

        _, d = lax.scan(body, jnp.zeros_like(r[0]), (transitions, r), reverse=transpose)
        return d
