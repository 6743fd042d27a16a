"""The scan that suits the platform."""

import jax.lax as lax

from ._associative import AssociativeScan
from ._base import AbstractScan
from ._sequential import SequentialScan


class AutoScan(AbstractScan):
    """`SequentialScan` on a CPU, `AssociativeScan` elsewhere, decided when a program is compiled: the default.

    A CPU has few cores for the many compositions of an associative scan, and compiles them ten times slower.

    **Arguments:** none. Cost: that of the scan it chooses.
    """

    def prefix(self, compose, elements, *, reverse=False):
        return lax.platform_dependent(
            elements,
            cpu=lambda elements: SequentialScan().prefix(compose, elements, reverse=reverse),
            default=lambda elements: AssociativeScan().prefix(compose, elements, reverse=reverse),
        )

    def linear(self, transitions, r):
        return lax.platform_dependent(transitions, r, cpu=SequentialScan().linear, default=AssociativeScan().linear)
