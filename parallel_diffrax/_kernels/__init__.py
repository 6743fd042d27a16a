"""What a new release of JAX may break: loops and scans as GPU kernels, and what looks into JAX's programs.

Nothing here knows an ODE, a recurrence or a Newton method, and no other room imports Pallas, MLIR, `jax.extend` or
`jax.core`, or looks at jaxprs and tracers. Every kernel is optional: where the device does not support it, or a test at the
first use fails, the caller's own arrays in XLA do the work.

- `_scalarise.py`: rewrites a function of small arrays as one of scalars, from its jaxpr.
- `_loop.py`: a loop in scalars as one kernel, by Pallas' Mosaic GPU.
- `_threads.py`: kernels in which every thread does something of its own, in MLIR. `_linear_recurrence.py` is written in it.
- `_probe.py`: what the default device supports. `_tracers.py`: whether a closure depends on what is being traced.
"""

from ._linear_recurrence import (
    linear_recurrence_in_kernels as linear_recurrence_in_kernels,
    scan_kernels_work as scan_kernels_work,
    suits_kernels as suits_kernels,
)
from ._loop import (
    in_batches as in_batches,
    indexed_loop as indexed_loop,
    kernel_loop as kernel_loop,
    LoopBody as LoopBody,
)
from ._probe import on_cpu as on_cpu
from ._scalarise import (
    as_scalars as as_scalars,
    object_array as object_array,
    ScalarFunction as ScalarFunction,
    scalarise as scalarise,
)
from ._tracers import holds_tracers as holds_tracers
