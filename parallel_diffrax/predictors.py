"""The first guess of states that are solved in parallel, in `ParallelSolver(predictor=...)`.

- `CoarsePredictor()`: the same method on a coarser grid. The default.
- `MultilevelPredictor()`: a few steps in sequence, then Newton's method on ever finer grids.
- `AdaptivePredictor()`: a loose adaptive solve. The fine grid follows its steps.
- `WarmStart()`: the trajectory of the previous solve.
- `ConstantPredictor()`: the initial state.

To write another, subclass `AbstractPredictor`. Its method `predict` receives a `Window` and the `Recurrence` of its fine
steps, and returns a `Prediction`.
"""

from ._ode import (
    AbstractPredictor as AbstractPredictor,
    AdaptivePredictor as AdaptivePredictor,
    CoarsePredictor as CoarsePredictor,
    ConstantPredictor as ConstantPredictor,
    MultilevelPredictor as MultilevelPredictor,
    WarmStart as WarmStart,
    Window as Window,
)
from ._recurrence import Prediction as Prediction, Recurrence as Recurrence
