"""The first guess of the states, in `ParallelSolver(predictor=...)`.

- `CoarsePredictor()`: the same method on a coarser grid. The default.
- `MultilevelPredictor()`: Newton's method on ever finer grids, from a few sequential steps.
- `AdaptivePredictor()`: a loose adaptive solve, whose steps also become the fine grid.
- `WarmStart()`: the trajectory of the previous solve.
- `ConstantPredictor()`: the initial state.

To write another, subclass `AbstractPredictor`. Its `predict` is given the `Window` and its `Recurrence`, and returns a
`Prediction`.
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
from ._recurrence import (
    Prediction as Prediction,
    Recurrence as Recurrence,
)
