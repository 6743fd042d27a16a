"""Parallel-in-time ODE solving for Diffrax."""

from ._ode import (
    CoarsePredictor as CoarsePredictor,
    ConstantPredictor as ConstantPredictor,
    ParallelSolver as ParallelSolver,
    WindowStatistics as WindowStatistics,
)
from ._recurrence import (
    Dense as Dense,
    NoFallback as NoFallback,
    parallel_scan as parallel_scan,
    ParallelNewton as ParallelNewton,
    SequentialFallback as SequentialFallback,
)
from ._scan import (
    AssociativeScan as AssociativeScan,
    BidiagonalSolver as BidiagonalSolver,
    SequentialScan as SequentialScan,
)
