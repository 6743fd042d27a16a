"""Nonlinear recurrences `y[i] = F(y[i-1], x[i])`, solved for all steps at once. Knows no Diffrax.

Notation, for `N` steps of a state raveled to `D` real numbers: `y` has shape `(N, D)` and does not contain the initial
state; `r[i] = F(y[i-1], x[i]) - y[i]` is the residual, called the defect of step `i` at the end; `A[i]` is the Jacobian
of `F(., x[i])` at `y[i-1]`; `d` is an update of `y`.

- `_recurrence.py`: the recurrence itself, its residual. `_ravel.py`: pytrees to vectors.
- `_stages.py`: the inner unknowns of steps that solve equations of their own.
- `_jacobian/`: what replaces `A`. A new approximation is one new file there.
- `_newton.py`, `_elk.py`: the root finders, on what they share in `_root_finder.py`. A new one is one new file.
- `_damping.py`, `_estimator.py`: the parts of `ELK`.
- `_stretches.py`: a sequence looked at in segments of equal length.
- `_progress.py`: when an iteration has converged. `_tolerance.py`: when an update, or a defect, is small.
- `_sequential.py`: the steps in sequence, fast: in scalars (`_scalar.py`), or a loop of them in one kernel (`_kernel.py`).
- `_attempt.py`: the engine: segments of steps solved in parallel and checked, or made in sequence.
- `_fallback/`: policies: what the engine is put on. A new one is one new file there.
- `_outlook.py`: how perturbations grow, and how far ahead Newton's method contracts.
- `_implicit.py`, `_sweep.py`: the derivative of the solution; the same for large states.
- `_solve.py`: a policy carried out, what is called successful, and the derivative.
- `_parallel_scan.py`: the same engine with the signature of `jax.lax.scan`.
- `_lyapunov.py`: Lyapunov exponents along a trajectory.
- `_convergence.py`: iterations watched, beside the rate that theory predicts.
"""

from ._convergence_history import (
    convergence_history as convergence_history,
    ConvergenceHistory as ConvergenceHistory,
)
from ._damping import (
    AbstractDamping as AbstractDamping,
    AdaptiveDamping as AdaptiveDamping,
    FixedDamping as FixedDamping,
)
from ._driver import (
    Attempt as Attempt,
    Counts as Counts,
    RecurrenceDriver as RecurrenceDriver,
    scan_of as scan_of,
)
from ._elk import ELK as ELK
from ._estimator import (
    AbstractEstimator as AbstractEstimator,
    KalmanFilter as KalmanFilter,
    KalmanSmoother as KalmanSmoother,
)
from ._implicit_derivative import nan_derivative_unless as nan_derivative_unless, stop_gradient as stop_gradient
from ._jacobian import (
    AbstractJacobian as AbstractJacobian,
    BlockDiagonal as BlockDiagonal,
    Clipped as Clipped,
    Dense as Dense,
    Diagonal as Diagonal,
    Hutchinson as Hutchinson,
    Identity as Identity,
    Scaled as Scaled,
    Zero as Zero,
)
from ._lyapunov import (
    check_estimate as check_estimate,
    estimate as estimate,
    LyapunovEstimate as LyapunovEstimate,
    scan_lyapunov_exponent as scan_lyapunov_exponent,
)
from ._newton import ParallelNewton as ParallelNewton
from ._parallel_scan import check_kinds as check_kinds, parallel_scan as parallel_scan
from ._policy import (
    AbstractPolicy as AbstractPolicy,
    AdaptivePolicy as AdaptivePolicy,
    ParallelOnly as ParallelOnly,
    ParallelThenSequential as ParallelThenSequential,
)
from ._prediction import Prediction as Prediction
from ._ravel import Ravel as Ravel
from ._recurrence import Recurrence as Recurrence
from ._root_finder import (
    AbstractParallelRootFinder as AbstractParallelRootFinder,
    safeguarded_update as safeguarded_update,
)
from ._segments import repeat_segments as repeat_segments, running_sum as running_sum, segment_maxima as segment_maxima
from ._solve import (
    keep_in_checkpoint as keep_in_checkpoint,
    RecurrenceSolution as RecurrenceSolution,
    SOLUTION as SOLUTION,
    solve_recurrence as solve_recurrence,
)
from ._stages import AbstractStages as AbstractStages, LinearisedStep as LinearisedStep
from ._stepper import Stepper as Stepper
from ._tolerance import num_leading_true as num_leading_true, Tolerance as Tolerance
