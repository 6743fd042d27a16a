"""Parallel-in-time ODE solving for Diffrax."""

from . import (
    damping as damping,
    diagnostics as diagnostics,
    jacobians as jacobians,
    policies as policies,
    predictors as predictors,
    root_finders as root_finders,
    scans as scans,
    step_maps as step_maps,
)
from ._ode import (
    AdaptivePredictor as AdaptivePredictor,
    CoarsePredictor as CoarsePredictor,
    ConstantPredictor as ConstantPredictor,
    diffeqsolve as diffeqsolve,
    lyapunov_exponent as lyapunov_exponent,
    MultipleShooting as MultipleShooting,
    ParallelAdjoint as ParallelAdjoint,
    ParallelSolver as ParallelSolver,
    refine as refine,
    statistics as statistics,
    WarmStart as WarmStart,
    Windows as Windows,
)
from ._recurrence import (
    AdaptivePolicy as AdaptivePolicy,
    ELK as ELK,
    parallel_scan as parallel_scan,
    ParallelNewton as ParallelNewton,
)
