"""A linear recurrence evaluated by an associative scan, in logarithmic depth."""

import jax
import jax.lax as lax

from ._base import AbstractScan


def _compose(first, then):
    """Affine maps `d -> A d + r` compose associatively: `(A2 A1, A2 r1 + r2)`."""
    (A1, r1), (A2, r2) = first, then
    return A2.after(A1), A2.apply(r1) + r2


class AssociativeScan(AbstractScan):
    """`jax.lax.associative_scan` over affine maps.

    Work `2 N` compositions (`N D^3` dense, `N D` diagonal), depth `2 log2 N`, memory about three times `A` and `r`.

    ??? cite "Reference"

        Blelloch, "Prefix sums and their applications", Carnegie Mellon University, CMU-CS-90-190 (1990).
    """

    def solve(self, transitions, r, *, transpose=False):
        if transpose:
            transitions = transitions.reversed()
        # `vmap` is not needed for the composition: every structure broadcasts over leading axes.
        with jax.named_scope("associative_scan"):
            _, d = lax.associative_scan(_compose, (transitions, r), reverse=transpose)
        return d
