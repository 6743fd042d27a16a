"""Linear recurrences: pure algebra that knows no ODE and no Newton method.

Notation, for `N` steps of a `D`-dimensional state:

    d[i] = A[i] d[i-1] + r[i],   d[-1] = 0,   i = 0 .. N-1          L d = r
    w[i] = A[i+1]^T w[i+1] + r[i],   w[N] = 0                       L^T w = r

`L` is block lower bidiagonal: identities on the diagonal, `-A[i]` below it. `A[0]` multiplies zero and is never read.

- `_transitions.py`: the structures of `A` (full, diagonal, ...).
- `_abstract_scan.py`: the interface of a scan, which evaluates a recurrence. `_scans.py`: those in plain JAX.
    `_kernel_scan.py` uses GPU kernels; `_sharded_scan.py` spreads time over devices; `_auto_scan.py` chooses.
- `_bidiagonal.py`: the solution of `L d = r` as a differentiable function, and as a `lineax` solver.
- `_kalman.py`: the damped system `(L^T L + diag(l)) d = L^T r`, by the same scans.
- `_growth.py`: products of many `A` without overflow or underflow. `_spectrum.py`: the growth of a frame under them.
- `_shifts.py`: the steps before and after each step. `_segments.py`: a sequence cut into segments of equal length.
- `_elimination.py`: small dense systems. `_arguments.py`: checks of arguments, used by all rooms above.
"""

from ._abstract_scan import AbstractScan
from ._arguments import check_instance, check_integer
from ._auto_scan import AutoScan
from ._bidiagonal import BidiagonalSolver, solve_bidiagonal
from ._elimination import eliminate
from ._growth import compose, product_by_segments, products, ScaledProduct, total_product
from ._kalman import kalman_filter, kalman_smoother
from ._kernel_scan import KernelScan
from ._scans import AssociativeScan, BlockedScan, KoggeStoneScan, SequentialScan
from ._segments import join_segments, num_segments, repeat_segments, running_sum, segment_maxima, split_segments
from ._sharded_scan import ShardedScan
from ._shifts import preceded_by, row_at, shift, with_row
from ._spectrum import FRAME_BLOCK, frame_growth, orthonormalise
from ._transitions import (
    AbstractTransitions,
    BlockDiagonalTransitions,
    DenseTransitions,
    DiagonalTransitions,
    ScalarTransitions,
    ZeroTransitions,
)
