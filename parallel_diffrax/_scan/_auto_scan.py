"""Chooses a scan by platform and size."""

import math

import jax
import jax.tree_util as jtu

from ._abstract_scan import AbstractScan
from ._kernel_scan import KernelScan
from ._scans import AssociativeScan, BlockedScan, KoggeStoneScan, SequentialScan


# Up to this many numbers in all elements, a level of a scan costs its launch rather than its arithmetic (measured on an
# H200, `benchmarks/README.md`).
_LAUNCH_BOUND = 2**17
# Elements of more numbers are composed by batched matrix products. An associative scan makes the fewest of them.
_LARGEST_ELEMENT = 80
_RADIX = 4
# With large elements, no kernels are compiled for this many steps or fewer.
_FEW_STEPS = 32


class AutoScan(AbstractScan):
    """The default: the fastest scan for JAX's default backend, the number of steps and the size of an element.

    - On a CPU, `SequentialScan`. The other scans make more compositions, for which a CPU has few cores, and take ten times
      as long to compile.
    - Elsewhere, for elements of at most 80 numbers (`A[i]` and `r[i]`; dense up to `D = 8`): `KoggeStoneScan` for up to
      2^17 numbers in all, `KernelScan(BlockedScan(...))` for more.
    - Elsewhere, for larger elements: `KernelScan(AssociativeScan())` for more than 32 steps, `AssociativeScan()` for fewer.

    Kernels evaluate linear recurrences only. Other operations use the scan inside `KernelScan(...)`.

    The choice is made while tracing. `lax.platform_dependent` would make it later, but would trace all scans.

    **Cost:** depends on the chosen scan.
    """

    def _chosen(self, elements) -> AbstractScan:
        if jax.default_backend() == "cpu":
            return SequentialScan()
        leaves = jtu.tree_leaves(elements)
        numbers = sum(math.prod(x.shape[1:]) for x in leaves)
        if numbers > _LARGEST_ELEMENT:
            return AssociativeScan()
        # For this many carries, another level of blocks does not pay.
        num_carries = max(_LAUNCH_BOUND // numbers, 1)
        return KoggeStoneScan() if leaves[0].shape[0] <= num_carries else BlockedScan(_RADIX, num_carries)

    def prefix(self, compose, elements, *, reverse=False):
        return self._chosen(elements).prefix(compose, elements, reverse=reverse)

    def linear(self, transitions, r, *, reverse=False):
        chosen = self._chosen((transitions, r))
        if isinstance(chosen, BlockedScan | AssociativeScan) and r.shape[0] > _FEW_STEPS:
            chosen = KernelScan(chosen)
        return chosen.linear(transitions, r, reverse=reverse)
