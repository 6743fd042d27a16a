"""First guesses: one file each, named after how the guess is made."""

from ._adaptive import AdaptivePredictor as AdaptivePredictor
from ._base import AbstractPredictor as AbstractPredictor, WindowGuess as WindowGuess
from ._coarse import CoarsePredictor as CoarsePredictor
from ._constant import ConstantPredictor as ConstantPredictor
from ._multilevel import MultilevelPredictor as MultilevelPredictor
from ._warm_start import WarmStart as WarmStart
