"""The initial state, everywhere."""

import jax.numpy as jnp

from ..._recurrence import Prediction
from ._base import AbstractPredictor


class ConstantPredictor(AbstractPredictor):
    """Guesses that every state is the initial one.

    Use it for short windows and linear problems. It is poor for oscillations.

    **Arguments:** none.

    **Cost:** none.
    """

    def predict(self, window, recurrence, start_level):
        y = jnp.broadcast_to(recurrence.init, (recurrence.length, *recurrence.init.shape))
        return Prediction(y, jnp.array(0), jnp.array(recurrence.length), jnp.asarray(start_level))
