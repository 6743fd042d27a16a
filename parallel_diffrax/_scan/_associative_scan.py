"""A scan in logarithmic depth."""

import jax.lax as lax

from ._abstract_scan import AbstractScan


class AssociativeScan(AbstractScan):
    """`jax.lax.associative_scan`.

    Work `2 N` compositions (of linear recurrences: `N D^3` dense, `N D` diagonal), depth `2 log2 N`, memory about three
    times that of the elements.

    ??? cite "Reference"

        Blelloch, "Prefix sums and their applications", Carnegie Mellon University, CMU-CS-90-190 (1990).
    """

    def prefix(self, compose, elements, *, reverse=False):
        # `vmap` is not needed for the composition: it broadcasts over leading axes.
        return lax.associative_scan(compose, elements, reverse=reverse)
