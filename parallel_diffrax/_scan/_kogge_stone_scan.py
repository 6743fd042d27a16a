"""A scan of one operation per level."""

import jax.numpy as jnp
import jax.tree_util as jtu

from ._abstract_scan import AbstractScan
from ._shifts import flipped, shift


class KoggeStoneScan(AbstractScan):
    """At distance `s = 1, 2, 4, ...`, every element is composed with the one `s` before it.

    `log2 N` levels, each of which XLA compiles into one or two kernels, where `AssociativeScan` has twice as many levels of
    several: fastest on a GPU as long as launches cost more than arithmetic, and quickest to compile.

    Work `N log2 N` compositions, depth `log2 N`, memory twice that of the elements.

    ??? cite "Reference"

        Kogge and Stone, "A parallel algorithm for the efficient solution of a general class of recurrence equations",
        IEEE Transactions on Computers C-22 (1973).
    """

    def prefix(self, compose, elements, *, reverse=False):
        if reverse:
            return flipped(self.prefix(compose, flipped(elements)))
        num_steps, distance = jtu.tree_leaves(elements)[0].shape[0], 1
        while distance < num_steps:
            # The first ones are complete.
            head, first, then = (
                jtu.tree_map(lambda x, part=part: x[part], elements)
                for part in (slice(distance), slice(-distance), slice(distance, None))
            )
            elements = jtu.tree_map(lambda a, b: jnp.concatenate([a, b]), head, compose(first, then))
            distance *= 2
        return elements

    def linear(self, transitions, r, *, reverse=False):
        num_steps, distance = r.shape[0], 1
        # The first would be multiplied by zeros from before the beginning, and may be anything.
        index = jnp.arange(num_steps)
        transitions = transitions.where(index < num_steps - 1 if reverse else index > 0)
        while distance < num_steps:
            # A shift is read where it is needed, and makes no kernel of its own.
            by = -distance if reverse else distance
            r_before, before = jtu.tree_map(lambda x, by=by: shift(x, by), (r, transitions))
            r = transitions.apply(r_before) + r
            transitions = transitions.after(before) if 2 * distance < num_steps else transitions
            distance *= 2
        return r
