"""The initial state, everywhere."""

import jax.numpy as jnp

from ..._recurrence import Prediction
from ._base import AbstractPredictor


class ConstantPredictor(AbstractPredictor):
    """Guesses that nothing changes. Free; good for short windows and linear problems, poor for oscillations.

    **Arguments:** none.
    """

    def predict(self, window, recurrence, start_level):
        y = jnp.broadcast_to(recurrence.init, (recurrence.length, *recurrence.init.shape))
        return Prediction(y, jnp.array(0), jnp.array(recurrence.length), jnp.asarray(start_level))
