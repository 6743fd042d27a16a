"""Linear recurrences: pure algebra that knows no ODE and no Newton.

Notation, for `N` steps of a `D`-dimensional state:

    d[i] = A[i] d[i-1] + r[i],   d[-1] = 0,   i = 0 .. N-1          L d = r
    w[i] = A[i+1]^T w[i+1] + r[i],   w[N] = 0                       L^T w = r

`L` is block lower bidiagonal: identities on the diagonal, `-A[i]` below it. `A[0]` multiplies zero and is never read.

- `_transitions/`: what `A` is (full, diagonal, ...). A new structure of `A` is one new file there.
- `_base.py`: how a recurrence is evaluated; `_sequential.py`, `_associative.py`, `_kogge_stone.py`, `_blocked.py`: a new
  scan is one new file; `_kernel.py`: by kernels of a GPU, written in `_threads.py`; `_auto.py` chooses; `_sharded.py`: on
  many devices.
- `_neighbours.py`: the steps before and after each.
- `_bidiagonal.py`: `L` as a `lineax` operator with its solver, and as a function that can be differentiated.
- `_kalman.py`: the damped system `(L^T L + diag(l)) d = L^T r`, by the same scans.
- `_growth.py`: products of many `A` that neither overflow nor underflow. `_spectrum.py`: how they segment a frame.
- `_elimination.py`: small dense systems.
"""

from ._abstract_scan import AbstractScan as AbstractScan
from ._arguments import check_instance as check_instance, check_integer as check_integer
from ._associative_scan import AssociativeScan as AssociativeScan
from ._auto_scan import AutoScan as AutoScan
from ._bidiagonal import (
    BidiagonalOperator as BidiagonalOperator,
    BidiagonalSolver as BidiagonalSolver,
    solve_bidiagonal as solve_bidiagonal,
)
from ._blocked_scan import BlockedScan as BlockedScan
from ._elimination import eliminate as eliminate
from ._growth import (
    compose as compose,
    product_by_segments as product_by_segments,
    products as products,
    ScaledProduct as ScaledProduct,
    total_product as total_product,
)
from ._kalman import kalman_filter as kalman_filter, kalman_smoother as kalman_smoother
from ._kernel_scan import KernelScan as KernelScan
from ._kogge_stone_scan import KoggeStoneScan as KoggeStoneScan
from ._sequential_scan import SequentialScan as SequentialScan
from ._sharded_scan import ShardedScan as ShardedScan
from ._shifts import (
    preceded_by as preceded_by,
    row_at as row_at,
    shift as shift,
    with_row as with_row,
)
from ._spectrum import (
    FRAME_BLOCK as FRAME_BLOCK,
    frame_growth as frame_growth,
    orthonormalise as orthonormalise,
)
from ._transitions import (
    AbstractTransitions as AbstractTransitions,
    BlockDiagonalTransitions as BlockDiagonalTransitions,
    DenseTransitions as DenseTransitions,
    DiagonalTransitions as DiagonalTransitions,
    ScalarTransitions as ScalarTransitions,
    ZeroTransitions as ZeroTransitions,
)
