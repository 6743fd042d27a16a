"""The code that a new release of JAX may break: loops and scans as GPU kernels, and inspection of JAX's programs.

This room knows no ODE and no Newton method. No other room imports Pallas, MLIR, `jax.extend` or `jax.core`, or inspects
jaxprs and tracers. Every kernel is optional: if the device does not support it, or if a test at the first use fails, the
caller's code in arrays runs in XLA instead.

- `_scalarise.py`: rewrites a function of small arrays as a function of scalars, from its jaxpr.
- `_operations.py`: JAX's elementwise primitives, by the few operations of a backend.
- `_threads.py`: what a backend has to offer: kernels are written thread by thread. `_mosaic.py`: in MLIR inside Pallas'
  Mosaic GPU. `_warp.py`: in C++, compiled by NVIDIA Warp, also for CPUs. (Tests have one that emulates threads.)
- `_loop.py`: a loop in scalars as one kernel, with a thread per member of a batch. `_linear_recurrence.py`: scans.
- `_probe.py`: which kernels may run. `_tracers.py`: whether a closure depends on traced values.
  `_forward_mode.py`: whether a function has derivatives in forward mode.
- `_batches.py`: programs that depend on the size of a batch.
"""

from ._batches import any_member, by_batch_size, in_batches, largest_member, repeats
from ._forward_mode import has_forward_mode
from ._linear_recurrence import linear_recurrence_in_kernels, scan_kernels_work, suits_kernels
from ._loop import in_scalars, indexed_loop, kernel_loop, KernelLoop, loop_operations, LoopBody, wide_loop
from ._probe import by_platform, on_cpu, SETTINGS
from ._scalarise import as_scalars, largest_array, object_array, ScalarFunction, scalarise
from ._tracers import closed, holds_tracers
