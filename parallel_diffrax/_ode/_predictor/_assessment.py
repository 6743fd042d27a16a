"""How good a guess is, measured by the defects that it leaves."""

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._recurrence import num_leading_true, Recurrence
from ..._scan import repeat_segments, running_sum, segment_maxima, shift


# A guess is good if the sum of its defects, relative to the size of the solution, is at most this. Measured on seven
# oscillating, chaotic and smooth problems: Newton's method then takes 2 to 5 iterations, and up to 24 from a worse guess.
GOOD = 3e-3
# Beyond this relative sum, a guess is worse than none.
_USELESS = 0.5
# The usefulness of a guess at a step is judged on the preceding 1/16 of all steps.
_RECENT = 16
# The size of a guess so far is computed for this many segments.
_SEGMENTS = 512


def assess(recurrence: Recurrence, guess: Float[Array, " N D"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """How far a guess is useful, and how large its error is.

    The measure is the partial sums of the defects, relative to the size of each component so far. These sums are the Picard
    correction of the guess; Newton's correction differs from it by the growth of perturbations. (The size over the whole
    window would excuse a guess that grows without bound.)

    **Returns:**

    - The number of leading steps on which the guess is useful: the sum over the preceding sixteenth of all steps is small.
      (The sum over all steps of a guess with a phase error grows with time, and such a guess is good all the same.)
    - The score: the largest entry of the sums from the first step on; infinite for a guess that is not finite.
    """
    defect = recurrence.residual(guess)
    finite = jnp.all(jnp.isfinite(guess) & jnp.isfinite(defect), axis=1)
    size = jnp.maximum(_size_so_far(jnp.abs(jnp.where(finite[:, None], guess, 0))), jnp.abs(recurrence.init))
    drift = running_sum(defect)
    recent = drift - shift(drift, -(-recurrence.length // _RECENT))
    score = jnp.where(jnp.all(finite), jnp.max(_relative(drift, size)), jnp.inf)
    return num_leading_true(finite & (_relative(recent, size) <= _USELESS)), score


def _relative(drift, size):
    return jnp.max(jnp.where(drift == 0, 0, jnp.abs(drift) / size), axis=1)


def _size_so_far(magnitude: Float[Array, " N D"]) -> Float[Array, " N D"]:
    """The largest entry of each column up to the end of the step's segment, one of 512.

    It looks ahead to the end of the segment because a component may start from zero.
    """
    return repeat_segments(lax.cummax(segment_maxima(magnitude, _SEGMENTS), axis=0), magnitude.shape[0], _SEGMENTS)
