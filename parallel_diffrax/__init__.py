"""Parallel-in-time ODE solving for Diffrax."""

from ._ode import (
    AdaptivePredictor as AdaptivePredictor,
    CoarsePredictor as CoarsePredictor,
    ConstantPredictor as ConstantPredictor,
    lyapunov_exponent as lyapunov_exponent,
    ParallelAdjoint as ParallelAdjoint,
    ParallelSolver as ParallelSolver,
    refine as refine,
    WarmStart as WarmStart,
    Windows as Windows,
    WindowStatistics as WindowStatistics,
)
from ._recurrence import (
    AdaptiveDamping as AdaptiveDamping,
    BlockDiagonal as BlockDiagonal,
    Clipped as Clipped,
    convergence_history as convergence_history,
    ConvergenceHistory as ConvergenceHistory,
    Dense as Dense,
    Diagonal as Diagonal,
    ELK as ELK,
    FixedDamping as FixedDamping,
    Hutchinson as Hutchinson,
    Identity as Identity,
    KalmanFilter as KalmanFilter,
    KalmanSmoother as KalmanSmoother,
    LyapunovEstimate as LyapunovEstimate,
    LyapunovFallback as LyapunovFallback,
    NoFallback as NoFallback,
    parallel_scan as parallel_scan,
    ParallelNewton as ParallelNewton,
    Scaled as Scaled,
    scan_lyapunov_exponent as scan_lyapunov_exponent,
    SequentialFallback as SequentialFallback,
    Zero as Zero,
)
from ._scan import (
    AssociativeScan as AssociativeScan,
    AutoScan as AutoScan,
    BidiagonalSolver as BidiagonalSolver,
    SequentialScan as SequentialScan,
)
