"""How good a guess is, measured by the defects that it leaves, and a second guess only where it is not good enough."""

from collections.abc import Callable
from typing import TypeVar

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int

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

_Tree = TypeVar("_Tree")


def assess(recurrence: Recurrence, guess: Float[Array, " N D"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The number of leading steps on which a guess is useful, and its score, which estimates its error.

    The measure is the partial sums of the defects, relative to the size of each component so far. These sums are the Picard
    correction of the guess; Newton's correction differs from it by the growth of perturbations. (The size over the whole
    window would excuse a guess that grows without bound.) The guess is useful at a step if the sum over the preceding
    sixteenth of all steps is small. (The sum over all steps of a guess with a phase error grows with time, and such a guess
    is good all the same.) The score is the largest entry of the sums from the first step on, infinite for a guess that is
    not finite.
    """
    defect = recurrence.residual(guess)
    finite = jnp.all(jnp.isfinite(guess) & jnp.isfinite(defect), axis=1)
    # The largest magnitude so far, up to the end of the step's segment: a component may start from zero.
    largest = lax.cummax(segment_maxima(jnp.abs(jnp.where(finite[:, None], guess, 0)), _SEGMENTS), axis=0)
    size = jnp.maximum(repeat_segments(largest, guess.shape[0], _SEGMENTS), jnp.abs(recurrence.init)[None])
    drift = running_sum(defect)
    recent = drift - shift(drift, -(-recurrence.length // _RECENT))
    score = jnp.where(jnp.all(finite), jnp.max(_relative(drift, size)), jnp.inf)
    return num_leading_true(finite & (_relative(recent, size) <= _USELESS)), score


def _relative(drift, size):
    return jnp.max(jnp.where(drift == 0, 0, jnp.abs(drift) / size), axis=1)


def evaluate_unless(done: Bool[Array, ""], value: _Tree, other: Callable[[], _Tree]) -> _Tree:
    """`value` if `done`, else `other()`. A batch evaluates `other` if one member needs it, and skips it if none does.

    (A loop of at most one iteration. `lax.cond` would evaluate `other` in every batch.)
    """

    def body(carry):
        return jnp.array(True), jtu.tree_map(lambda a, b: jnp.asarray(b, a.dtype), carry[1], other())

    return lax.while_loop(lambda carry: ~carry[0], body, (done, value))[1]
