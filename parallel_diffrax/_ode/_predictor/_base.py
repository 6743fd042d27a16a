"""The interface of every predictor."""

import abc

import equinox as eqx
from jaxtyping import Array, Float, Int

from ..._recurrence import Recurrence
from .._window import Window


class Prediction(eqx.Module):
    """**Attributes:** `y`, the guess of the raveled states, shape `(N, D)`, finite; `steps`, how many steps were made in
    sequence for it."""

    y: Float[Array, " N D"]
    steps: Int[Array, ""]


class AbstractPredictor(eqx.Module):
    """Where the first iterate of a window comes from. It is never differentiated."""

    @abc.abstractmethod
    def predict(self, window: Window, recurrence: Recurrence) -> Prediction:
        """A first guess of all states of the window.

        **Arguments:** the window, which may be a part of the solver's, made for more steps than it has
        (`Window.part`); its recurrence. Both without tangents.
        """


class WindowGuess(eqx.Module):
    """A predictor on the parts of a window, as `solve_recurrence` calls for it."""

    predictor: AbstractPredictor
    window: Window

    def __call__(self, stretch, start, count):
        prediction = self.predictor.predict(self.window.part(start, stretch.init, count, stretch.length), stretch)
        return prediction.y, prediction.steps
