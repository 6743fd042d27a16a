"""The scan that suits the platform."""

import jax

from ._associative import AssociativeScan
from ._base import AbstractScan
from ._sequential import SequentialScan


class AutoScan(AbstractScan):
    """`SequentialScan` where JAX's default backend is a CPU, `AssociativeScan` elsewhere: the default.

    A CPU has few cores for the many compositions of an associative scan, and takes ten times as long to compile them. (The
    choice is made while tracing. `lax.platform_dependent` would make it later, at the price of tracing both.)

    **Arguments:** none. Cost: that of the scan it chooses.
    """

    def _chosen(self) -> AbstractScan:
        return SequentialScan() if jax.default_backend() == "cpu" else AssociativeScan()

    def prefix(self, compose, elements, *, reverse=False):
        return self._chosen().prefix(compose, elements, reverse=reverse)

    def linear(self, transitions, r, *, reverse=False):
        return self._chosen().linear(transitions, r, reverse=reverse)
