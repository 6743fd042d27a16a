"""The first guess of the states of a segment."""

import equinox as eqx
from jaxtyping import Array, Float, Int


class Prediction(eqx.Module):
    """A first guess.

    **Attributes:**

    - `y`: the raveled states, shape `(N, D)`. The driver replaces steps that are not finite by the state before the segment.
    - `steps`: the number of steps made sequentially for it.
    - `valid_steps`: the number of leading steps on which it is a useful guess.
    - `start_level`: where the predictor should begin for the next segment. Only the predictor interprets it. At first it is
        zero.
    - `finer_level`: the same, if this guess turns out to be too coarse. By default there is no finer guess.
    """

    y: Float[Array, " N D"]
    steps: Int[Array, ""]
    valid_steps: Int[Array, ""]
    start_level: Int[Array, ""]
    finer_level: Int[Array, ""] | None = None
