"""First guesses.

- `_base.py`: the interface. `_adaptive.py`, `_coarse.py`, `_constant.py`, `_multilevel.py`, `_warm_start.py`: one predictor
  each.
- `_coarse_grid.py`: the coarse solve and its interpolation. `_extrapolation.py`: large steps of low-order methods.
- `_assessment.py`: how good a guess is.
- `_hermite.py`: cubic interpolation. `_lazy_evaluation.py`: a second guess only where the first is not good enough.
"""

from ._adaptive import AdaptivePredictor as AdaptivePredictor
from ._base import AbstractPredictor as AbstractPredictor, WindowGuess as WindowGuess
from ._coarse import CoarsePredictor as CoarsePredictor
from ._constant import ConstantPredictor as ConstantPredictor
from ._multilevel import MultilevelPredictor as MultilevelPredictor
from ._warm_start import WarmStart as WarmStart
