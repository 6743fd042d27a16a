"""Nonlinear recurrences `y[i] = F(y[i-1], x[i])`: all steps at once, or sequentially. Knows no Diffrax.

Notation, for `N` steps of a state raveled to `D` real numbers: `y` has shape `(N, D)` and does not contain the initial
state; `r[i] = F(y[i-1], x[i]) - y[i]` is the residual, called the defect at the end of a solve; `A[i]` is the Jacobian of
`F(., x[i])` at `y[i-1]`; `d` is an update of `y`; `w` are inner unknowns of the steps.

- `_recurrence.py`: the recurrence and its residual. `_ravel.py`: conversion of pytrees to vectors. `_stages.py`: the inner
  unknowns of steps that solve equations of their own. `_prediction.py`: the first guess.
- `_root_finder.py`: the base class of the root finders, which iterate on all steps, with `SolveRequest` and `SolveReport`.
  `_newton.py`, `_elk.py`: the root finders; a new one is a new file. `_damping.py`: the parts of `ELK`.
- `_jacobians.py`: approximations of `A`. `_condensation.py`: elimination of the inner unknowns.
- `_tolerance.py`: tests whether an update or a defect is small. `_monitors.py`: when an iteration has converged, on which
  leading steps it contracts, and how perturbations grow.
- `_shooting.py`: Newton's method on the states after intervals of several steps, in kernels (`N` steps are `M` intervals of
  `L`).
- `_driver.py`: makes steps, in parallel or sequentially. `_verification.py`: verifies what a root finder found.
  `_stepper.py`: sequential steps. `_policies.py`: decide which steps the driver makes in parallel. `_cost.py`: what steps
  cost either way, by which the default policy decides.
- `_solve.py`: a solve under a policy, with the derivative. `_solution.py`: its result and its work.
- `_implicit_derivative.py`: the derivative of a solution, by a linear recurrence with the Jacobians of all steps;
  `_interval_products.py`: the same by products in kernels; `_matrix_free.py`: the same for large states;
  `_sequential_derivative.py`: that of sequential steps, by one sweep of products with Jacobians;
  `_replayed_derivative.py`: the same for steps whose states were not stored; `_tangents.py`: operations on tangents.
- `_scan_problem.py`: the arguments of `jax.lax.scan(f, init, xs)` as a recurrence. `_parallel_scan.py`: the scan itself.
  `_lyapunov.py`: Lyapunov exponents. `_convergence_history.py`: the convergence of every step, compared with theory.
"""

from ._convergence_history import convergence_history, ConvergenceHistory
from ._cost import CostEstimate
from ._damping import AbstractDamping, AbstractEstimator, AdaptiveDamping, FixedDamping, KalmanFilter, KalmanSmoother
from ._driver import Attempt, RecurrenceDriver
from ._elk import ELK
from ._implicit_derivative import with_reverse_derivative
from ._jacobians import AbstractJacobian, BlockDiagonal, Clipped, Dense, Diagonal, Hutchinson, Identity, Scaled, Zero
from ._lyapunov import check_estimate, estimate, LyapunovEstimate, scan_lyapunov_exponent
from ._newton import ParallelNewton, safeguarded_update
from ._parallel_scan import parallel_scan
from ._policies import AbstractPolicy, AdaptivePolicy, CostPolicy, ParallelOnly, ParallelThenSequential, Sequential
from ._prediction import Prediction
from ._ravel import Ravel
from ._recurrence import Recurrence
from ._replayed_derivative import AbstractInputs, KeptStates, MadeSteps, segment_length, with_replayed_derivative
from ._root_finder import AbstractParallelRootFinder, scan_of, SolveReport, SolveRequest
from ._sequential_derivative import with_sequential_derivative
from ._solution import Counts, RecurrenceSolution, Segments
from ._solve import check_kinds, keep_in_checkpoint, SOLUTION, solve_recurrence
from ._stages import AbstractStages, LinearisedStep
from ._stepper import operations_in_kernel, Stepper
from ._tangents import nan_derivative_unless, nan_unless, stop_gradient, without_tangents
from ._tolerance import num_leading_true, Tolerance
