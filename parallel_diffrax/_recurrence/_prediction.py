"""First guesses, as a policy asks for them."""

import equinox as eqx
from jaxtyping import Array, Float, Int


class Prediction(eqx.Module):
    """A first guess.

    **Attributes:**

    - `y`: the raveled states, shape `(N, D)`, finite.
    - `steps`: how many steps were made in sequence for it.
    - `reach`: the number of leading steps up to which it is one.
    - `start_level`: what to hand in for the next part of the window, to begin where this one ended.
    """

    y: Float[Array, " N D"]
    steps: Int[Array, ""]
    reach: Int[Array, ""]
    start_level: Int[Array, ""]
