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

        **Arguments:** the window; its recurrence, without tangents.
        """
