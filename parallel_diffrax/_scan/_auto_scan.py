"""The scan that suits the platform and the size."""

import math

import jax
import jax.tree_util as jtu

from ._abstract_scan import AbstractScan
from ._associative_scan import AssociativeScan
from ._blocked_scan import BlockedScan
from ._kernel_scan import KernelScan
from ._kogge_stone_scan import KoggeStoneScan
from ._sequential_scan import SequentialScan


# Where a level of a scan costs its launch rather than its arithmetic: up to so many numbers in all elements (measured on an
# H200, `benchmarks/README.md`).
_LAUNCH_BOUND = 2**17
# Elements of more numbers are composed by batched matrix products, of which an associative scan makes the fewest.
_LARGEST_ELEMENT = 80
_RADIX = 4
# No kernels are compiled for fewer steps of large elements.
_FEW_STEPS = 32


class AutoScan(AbstractScan):
    """The scan that is fastest on JAX's default backend, for the number of elements and their size: the default.

    - on a CPU `SequentialScan`: it has few cores for the many compositions of the others, which take ten times as long to
      compile;
    - elsewhere `KoggeStoneScan` for few steps of a small state; for many, or of a larger state, `KernelScan`. For what that
      leaves to others, `BlockedScan` where states are small and `AssociativeScan` where they are large.

    (The choice is made while tracing. `lax.platform_dependent` would make it later, at the price of tracing all.)

    **Arguments:** none. Cost: that of the scan it chooses.
    """

    def _chosen(self, elements) -> AbstractScan:
        if jax.default_backend() == "cpu":
            return SequentialScan()
        leaves = jtu.tree_leaves(elements)
        num_steps = leaves[0].shape[0]
        numbers = sum(math.prod(x.shape[1:]) for x in leaves)
        if numbers > _LARGEST_ELEMENT:
            return AssociativeScan()
        # As many carries as are worth no other level of blocks.
        num_carries = max(_LAUNCH_BOUND // numbers, 1)
        return KoggeStoneScan() if num_steps <= num_carries else BlockedScan(_RADIX, num_carries)

    def prefix(self, compose, elements, *, reverse=False):
        return self._chosen(elements).prefix(compose, elements, reverse=reverse)

    def linear(self, transitions, r, *, reverse=False):
        chosen = self._chosen((transitions, r))
        if isinstance(chosen, BlockedScan | AssociativeScan) and r.shape[0] > _FEW_STEPS:
            chosen = KernelScan(chosen)
        return chosen.linear(transitions, r, reverse=reverse)
