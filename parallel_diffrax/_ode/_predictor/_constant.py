"""The initial state, everywhere."""

import jax.numpy as jnp

from ._base import AbstractPredictor, Prediction


class ConstantPredictor(AbstractPredictor):
    """Guesses that nothing changes. Free; good for short windows and linear problems, poor for oscillations.

    **Arguments:** none.
    """

    def predict(self, window, recurrence, hint):
        y = jnp.broadcast_to(recurrence.init, (recurrence.length, *recurrence.init.shape))
        return Prediction(y, jnp.array(0), jnp.array(recurrence.length), jnp.asarray(hint))
