"""Diffrax solvers whose steps are made many at a time. Knows Diffrax; uses the recurrences of `_recurrence`.

One Diffrax step is a *window*: the interval `[t0, t1]` with up to `num_steps` fine steps of the base solver. Steps of known
lengths are a recurrence, which a policy solves in parallel or sequentially. Under an adaptive step-size controller, by
default, the controller chooses each step after the one before, and they are sequential.

- `_step_map/`: one step of a base solver as a function that can be vmapped and differentiated in forward mode. To add a step
    map, add a file and one line in its `__init__.py`.
- `_predictor/`: the first guess of the states. To add a predictor, add a file. `_jumps.py`: where the
    vector field jumps in time.
- `_window.py`: the fine steps of known lengths of a window as a recurrence, and the outputs at its solution.
- `_controlled_steps.py`: steps that the user's controller chooses, as one loop. `_controlled_window.py`: the same as a
    window, with derivatives, dense output and an error estimate for the length of the next window.
- `_interpolation.py`: dense output inside a window, of steps that are kept or made once more (`RepeatedSteps`).
    `_refine.py`: the same over all fine steps of a solve.
- `_solver.py`: `ParallelSolver`. `_statistics.py`: what it carries between windows, and the statistics in it.
- `_window_controller.py`: `Windows`, the controller that lays windows over the time span.
- `_diffeqsolve.py`: the front door, Diffrax's function with a choice of windows.
- `_adjoint.py`: `ParallelAdjoint`. It runs Diffrax's loop over windows (`_loop_state.py`) with a loop that stores what
    derivatives need (`_window_loop.py`), saves outputs at once (`_saving.py`) and finds events on fine steps (`_events.py`).
- `_lyapunov_exponent.py`: Lyapunov exponents of an equation. `_cost_estimate.py`: what its steps cost either way.
  `_plot.py`: a picture of a solve.
- `_gaussian_elimination.py`: a linear solver without LAPACK for implicit steps.
- `_compat.py`: what Diffrax and Equinox do not offer publicly, such as the controller of the solve that is being traced.
"""

from ._adjoint import ParallelAdjoint as ParallelAdjoint
from ._cost_estimate import estimate_cost as estimate_cost
from ._diffeqsolve import diffeqsolve as diffeqsolve
from ._lyapunov_exponent import lyapunov_exponent as lyapunov_exponent
from ._plot import plot as plot
from ._predictor import (
    AbstractPredictor as AbstractPredictor,
    AdaptivePredictor as AdaptivePredictor,
    CoarsePredictor as CoarsePredictor,
    ConstantPredictor as ConstantPredictor,
    MultilevelPredictor as MultilevelPredictor,
    WarmStart as WarmStart,
)
from ._refine import refine as refine
from ._solver import ParallelSolver as ParallelSolver
from ._statistics import statistics as statistics, WindowStatistics as WindowStatistics
from ._step_map import (
    AbstractEmbeddedSolver as AbstractEmbeddedSolver,
    AbstractStepMap as AbstractStepMap,
    MultipleShooting as MultipleShooting,
    StepOutput as StepOutput,
)
from ._window import Window as Window
from ._window_controller import Windows as Windows
