"""First guesses.

- `_base.py`: the interface, and the initial state as a guess. `_adaptive.py`, `_coarse.py`, `_multilevel.py`,
  `_warm_start.py`: one predictor each.
- `_coarse_grid.py`: the coarse solve and cubic interpolation. `_extrapolation.py`: large steps of low-order methods.
- `_assessment.py`: how good a guess is, and a second guess only where the first is not good enough.
"""

from ._adaptive import AdaptivePredictor as AdaptivePredictor
from ._base import (
    AbstractPredictor as AbstractPredictor,
    ConstantPredictor as ConstantPredictor,
    WindowGuess as WindowGuess,
)
from ._coarse import CoarsePredictor as CoarsePredictor
from ._multilevel import MultilevelPredictor as MultilevelPredictor
from ._warm_start import WarmStart as WarmStart
