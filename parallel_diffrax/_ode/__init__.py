"""Diffrax: its solvers as step maps, the first guess, the window, and the solver that `diffeqsolve` is given.

One Diffrax step is a window `[t0, t1]` of `num_steps` fine steps of the base solver.

- `_step_map/`: one step of a base solver as a function that can be vmapped and differentiated forwards. A new kind of
  step map is one new file there, and one line in its `__init__.py`.
- `_predictor/`: the first guess of the states. A new predictor is one new file there.
- `_window.py`: all fine steps of one window, as the recurrence to solve and the outputs at its solution.
- `_interpolation.py`: dense output inside a window.
- `_solver.py`: `ParallelSolver`. `_statistics.py`: what it counts.
- `_refine.py`: the same over all fine steps, for Diffrax's own evaluation.
- `_windows.py`: the controller that lays windows over the time span.
- `_adjoint.py`: `ParallelAdjoint`: Diffrax's loop over windows (`_loop_state.py`), with outputs written at once
  (`_saving.py`), events on fine steps (`_events.py`), and a loop that keeps what derivatives need (`_window_loop.py`).
- `_compat.py`: what Diffrax and Equinox do not offer publicly.
"""

from ._adjoint import ParallelAdjoint as ParallelAdjoint
from ._lyapunov_exponent import lyapunov_exponent as lyapunov_exponent
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
from ._statistics import WindowStatistics as WindowStatistics
from ._step_map import (
    AbstractEmbeddedSolver as AbstractEmbeddedSolver,
    AbstractStepMap as AbstractStepMap,
    MultipleShooting as MultipleShooting,
    StepOutput as StepOutput,
)
from ._window import Window as Window
from ._window_controller import Windows as Windows
