"""Tests of whether an update, or the defect of a step, is small.

A maximum does not detect NaN: XLA's reductions on the CPU drop it (jaxlib 0.10.2, arrays of a thousand entries and more).
Every decision about success therefore calls `isfinite`.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from .._scan import (
    AbstractTransitions,
    join_segments,
    preceded_by,
    running_sum,
    segment_maxima,
    shift,
    split_segments,
    with_row,
)


# A step's equation holds to rounding if its defect is at most this many epsilons of the state's size.
_ROUNDINGS = 8.0
# Number of segments at whose ends the running maximum of a state is known.
_NUM_SEGMENTS = 64
# A component below this fraction of the numbers it is computed from has been cancelled.
_CANCELLED = 1e-4


def _rounding(eps: float, size: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The rounding error of numbers of this size. Below the smallest normal number, XLA rounds to zero."""
    limits = jnp.finfo(size.dtype)
    underflow = limits.tiny if limits.bits >= 32 else limits.smallest_subnormal
    return _ROUNDINGS * jnp.maximum(eps * size, jnp.asarray(underflow, size.dtype))


def num_leading_true(satisfied: Bool[Array, " N"]) -> Int[Array, ""]:
    """The number of leading true entries: the index of the first false one, or `N`."""
    # A minimum, since XLA takes seconds to fold an `argmin` over constants.
    return jnp.min(jnp.where(satisfied, satisfied.shape[0], jnp.arange(satisfied.shape[0])))


def _size_so_far(y: Float[Array, " N D"]) -> Float[Array, " N D"]:
    """The maximum of `|y[l, j]|` over the last 32 steps `l <= i` and all earlier segments of `N / 64` steps.

    This approximates the maximum over all `l <= i` without a long scan. It never looks ahead, so that a wild state does not
    excuse the states before it.
    """
    magnitude = jnp.abs(y)
    before = shift(lax.cummax(segment_maxima(magnitude, _NUM_SEGMENTS), axis=0))
    for by in (1, 2, 4, 8, 16):
        if by < y.shape[0]:
            magnitude = jnp.maximum(magnitude, shift(magnitude, by))
    return join_segments(jnp.maximum(split_segments(magnitude, _NUM_SEGMENTS), before[:, None]), y.shape[0])


class Tolerance(eqx.Module):
    """Compares updates and defects with the size of the solution up to the same step.

    The scale of `y[i, j]` is the maximum of `|y[l, j]|` over `l <= i`, approximated. It looks back, so that a component that
    crosses zero is no harder to solve for than its neighbours. It does not look ahead, so that the start of a growing
    solution is accurate.

    **Arguments:** `rtol` and `atol`: an entry of an update is small if it is at most `atol + max(rtol, 4 eps) * scale`;
    `norm`, a norm of the entries of one step; `eps`, the machine epsilon of the states.
    """

    rtol: Float[ArrayLike, ""]
    atol: Float[ArrayLike, ""]
    norm: Callable = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def scale(self, y: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """The scale of each entry of `y`."""
        return _size_so_far(y)

    def error(self, d: Float[Array, " N D"], scale: Float[Array, " N D"]) -> Float[Array, " N"]:
        """The norm of each step's update in units of the tolerance; infinite if the update is not finite."""
        rtol, atol = jnp.asarray(self.rtol, d.dtype), jnp.asarray(self.atol, d.dtype)
        allowed = jnp.maximum(atol + jnp.maximum(rtol, 4 * self.eps) * scale, _rounding(0.0, scale))
        scaled = jnp.where(d == 0, 0, jnp.abs(d) / allowed)
        error = jax.vmap(self.norm)(scaled)
        return jnp.where(jnp.all(jnp.isfinite(d), axis=1) & ~jnp.isnan(error), error, jnp.inf)

    def at_rounding(self, r: Float[Array, " N D"], size: Float[Array, " N D"]) -> Bool[Array, " N"]:
        """Whether each step's equation holds to rounding. `size` is the size of the numbers that each entry is computed
        from: see `rounding_size`."""
        return jnp.all(jnp.abs(r) <= _rounding(self.eps, size), axis=1)

    def resolved(
        self, d: Float[Array, " N D"], scale: Float[Array, " N D"], size: Float[Array, " N D"]
    ) -> Bool[Array, " N"]:
        """Whether each entry of each step's update is below half the digits of the dtype, or is noise. Noise is the update
        of a component that would be zero in exact arithmetic."""
        return jnp.all((jnp.abs(d) <= self.eps**0.5 * scale) | self.noise(d, size), axis=1)

    def noise(self, d: Float[Array, " N D"], size: Float[Array, " N D"]) -> Bool[Array, " N D"]:
        """Whether each entry of an update is a rounding error of the numbers that it is computed from."""
        return jnp.abs(d) <= 8 * _rounding(self.eps, size)

    def satisfied(
        self, r: Float[Array, " N D"], scale: Float[Array, " N D"], size: Float[Array, " N D"]
    ) -> Bool[Array, " N"]:
        """Whether the equations of all steps up to each one hold: the defects above rounding add up to a small error. (If
        each were tested alone, `N` defects of the size of the tolerance could be far from any solution.)"""
        rounding = jnp.abs(r) <= _rounding(self.eps, size)
        excess = running_sum(jnp.where(rounding, 0, jnp.abs(r)))
        return self.error(excess, scale) <= 1


def effective_scale(scale: Float[Array, " N D"], size: Float[Array, " N D"]) -> Float[Array, " N D"]:
    """The scale of updates: `scale`, but at least 1/10000 of the `size` of the numbers that the entry is computed from.
    Below that, an entry has been cancelled (it is zero by symmetry, say) and consists of rounding."""
    return jnp.maximum(scale, _CANCELLED * size)


def rounding_size(transitions: AbstractTransitions, scale: Float[Array, " N D"]) -> Float[Array, " N D"]:
    """The size of the numbers that each entry of a step is computed from: the maximum of its own scale and `|A|` times the
    scales before the step. A large component on which the entry does not depend adds nothing to its rounding."""
    mixed = transitions.abs().apply(preceded_by(scale[0], scale))
    # The first transition is not part of the residual's Jacobian. The first step takes the value of the second.
    mixed = with_row(mixed, 0, mixed[min(1, mixed.shape[0] - 1)])
    return jnp.maximum(scale, jnp.where(jnp.isfinite(mixed), mixed, 0))
