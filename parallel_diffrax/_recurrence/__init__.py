"""Nonlinear recurrences `y[i] = F(y[i-1], x[i])`, solved for all steps at once. Knows no Diffrax.

Notation, for `N` steps of a state raveled to `D` real numbers: `y` has shape `(N, D)` and does not contain the initial
state; `r[i] = F(y[i-1], x[i]) - y[i]` is the residual, called the defect at the end of a solve; `A[i]` is the Jacobian of
`F(., x[i])` at `y[i-1]`; `d` is an update of `y`; `w` are inner unknowns of the steps.

The problem:

- `_recurrence.py`: the recurrence and its residual. `_ravel.py`: conversion of pytrees to vectors.
- `_stages.py`: the inner unknowns of steps that solve equations of their own.
- `_prediction.py`: the first guess.

Root finders, which iterate on all steps:

- `_root_finder.py`: their base class, with `SolveRequest` and `SolveReport`. `_newton.py`, `_elk.py`: one file each; a new
  root finder is a new file. `_safeguard.py`: the safeguard of `ParallelNewton`. `_damping.py`, `_estimator.py`: parts of
  `ELK`.
- `_jacobian/`: approximations of `A`, one file each; a new approximation is a new file.
- `_condensation.py`: elimination of the inner unknowns.
- `_tolerance.py`: tests whether an update or a defect is small. `_convergence_monitor.py`: when an iteration has converged.
  `_contraction_monitor.py`: on which leading steps Newton's method contracts, and how perturbations grow.

A solve:

- `_driver.py`: makes steps, in parallel or sequentially. `_verification.py`: verifies what a root finder found.
  `_stepper.py`: sequential steps. `_counts.py`: the work.
- `_policy/`: decides which steps the driver makes in parallel, one file each; a new policy is a new file.
- `_solve.py`: a solve under a policy, with the derivative. `_solution.py`: its result.
- `_implicit_derivative.py`: the derivative of a solution; `_matrix_free.py`: the same for large states; `_tangents.py`:
  operations on tangents.

Functions of `f` in `jax.lax.scan(f, init, xs)`:

- `_scan_problem.py`: their arguments as a recurrence. `_parallel_scan.py`: the scan itself. `_lyapunov.py`: Lyapunov
  exponents. `_convergence_history.py`: the convergence of every step, compared with theory.
"""

from ._convergence_history import convergence_history, ConvergenceHistory
from ._damping import AbstractDamping, AbstractEstimator, AdaptiveDamping, FixedDamping, KalmanFilter, KalmanSmoother
from ._driver import Attempt, RecurrenceDriver
from ._elk import ELK
from ._jacobians import AbstractJacobian, BlockDiagonal, Clipped, Dense, Diagonal, Hutchinson, Identity, Scaled, Zero
from ._lyapunov import check_estimate, estimate, LyapunovEstimate, scan_lyapunov_exponent
from ._newton import ParallelNewton, safeguarded_update
from ._parallel_scan import parallel_scan
from ._policies import AbstractPolicy, AdaptivePolicy, ParallelOnly, ParallelThenSequential
from ._prediction import Prediction
from ._ravel import Ravel
from ._recurrence import Recurrence
from ._root_finder import AbstractParallelRootFinder, scan_of, SolveReport, SolveRequest
from ._solution import Counts, RecurrenceSolution
from ._solve import check_kinds, keep_in_checkpoint, SOLUTION, solve_recurrence
from ._stages import AbstractStages, LinearisedStep
from ._stepper import Stepper
from ._tangents import nan_derivative_unless, stop_gradient, without_tangents
from ._tolerance import num_leading_true, Tolerance
