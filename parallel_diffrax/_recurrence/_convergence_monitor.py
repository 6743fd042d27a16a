"""When an iteration on all steps has converged, and when it never will."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._scan import row_at
from ._segments import num_segments, repeat_segments, segment_maxima, split_segments
from ._tolerance import num_leading_true, Tolerance


# Exact Newton iteration is given up after this many iterations in which neither the update halved nor the solved part
# grew. Any iteration is, after as many in which the step after the solved part cannot be evaluated.
_PATIENCE = 10
# The rate of convergence is measured in so many segments of the sequence.
_NUM_SEGMENTS = 64
# A smaller update, in epsilons of the state's size, is noise: no rate is read off it.
_NOISE = 16.0


class ConvergenceMonitor(eqx.Module):
    """What an iteration has achieved.

    **Attributes:**

    - `update`: the largest entry of the last update, in units of the tolerance.
    - `prefix`: the number of leading steps that have converged.
    - `segments`: the largest entry of the last update in each of 64 segments of the sequence.
    - `terminate`, `diverged`: whether to stop; whether in failure.
    """

    update: Float[Array, ""]
    best_update: Float[Array, ""]
    segments: Float[Array, " M"]
    num_converged: Int[Array, ""]
    best_num_converged: Int[Array, ""]
    stalled: Int[Array, ""]
    terminate: Bool[Array, ""]
    diverged: Bool[Array, ""]

    @classmethod
    def start(cls, num_steps: int, dtype) -> "ConvergenceMonitor":
        """Before the first iteration."""
        infinite = jnp.array(jnp.inf, dtype)
        zero, false = jnp.array(0), jnp.array(False)
        segments = jnp.full(num_segments(num_steps, _NUM_SEGMENTS), jnp.inf, dtype)
        return cls(infinite, infinite, segments, zero, zero, zero, false, false)

    def after(
        self,
        tolerance: Tolerance,
        r: Float[Array, " N D"],
        d: Float[Array, " N D"],
        applied: Bool[Array, " N"],
        scale: Float[Array, " N D"],
        size: Float[Array, " N D"],
        exact: bool,
    ) -> "ConvergenceMonitor":
        """After one more iteration.

        **Arguments:**

        - `tolerance`: what small means.
        - `r`: the residual before the update.
        - `d`: the update.
        - `taken`: the steps that it was applied to; an iteration that was rejected took none.
        - `scale`, `size`: of the states, and of the numbers that they are computed from.
        - `exact`: whether `d` solves the exact linearisation.
        """
        num_steps = d.shape[0]
        error = tolerance.error(d, scale)
        update = jnp.max(error)
        noise = jnp.all(jnp.abs(d) <= _NOISE * tolerance.eps * scale, axis=1)
        segments = segment_maxima(jnp.where(applied, jnp.where(noise, 0, error), jnp.inf), _NUM_SEGMENTS)

        small = applied & (error <= 1)
        at_rounding = applied & tolerance.at_rounding(r, size) & tolerance.resolved(d, scale, size)
        if not exact:
            # An update of linear convergence is the first term of a geometric series. It must be small in total; and so
            # must what the defects add up to if nothing forgets them.
            # The sums are compared at the ends of segments, with the size at their beginnings.
            scales = split_segments(scale, _NUM_SEGMENTS)[:, 0]
            total = jnp.cumsum(jnp.sum(jnp.abs(split_segments(r, _NUM_SEGMENTS)), axis=1), axis=0)
            drift = jnp.cumsum(jnp.sum(split_segments(r, _NUM_SEGMENTS), axis=1), axis=0)
            forgotten = (_remaining(segments, self.segments) <= 1) & (tolerance.error(total, scales) <= 1)
            small = small & repeat_segments(forgotten, num_steps, _NUM_SEGMENTS)
            at_rounding = at_rounding & repeat_segments(
                tolerance.resolved(drift, scales, scales), num_steps, _NUM_SEGMENTS
            )
        num_converged = num_leading_true(small | at_rounding)

        falling = update <= 0.25 * self.update
        converged = jnp.all(small) | (jnp.all(small | at_rounding) & ~falling)

        progress = (update <= 0.5 * self.best_update) | (
            num_converged >= self.best_num_converged + max(num_steps // 64, 1)
        )
        if not exact:
            # How slow is slow is the user's choice of method. What cannot be evaluated will not become right.
            stuck = ~jnp.all(jnp.isfinite(row_at(r, num_converged)))
            progress = ~stuck | (num_converged > self.best_num_converged)
        stalled = jnp.where(progress, 0, self.stalled + 1)
        diverged = ~converged & (stalled >= _PATIENCE)
        return ConvergenceMonitor(
            update=update,
            best_update=jnp.where(progress, jnp.fmin(update, self.best_update), self.best_update),
            segments=segments,
            num_converged=num_converged,
            best_num_converged=jnp.where(
                progress, jnp.maximum(num_converged, self.best_num_converged), self.best_num_converged
            ),
            stalled=stalled,
            terminate=converged | diverged,
            diverged=diverged,
        )


def _remaining(now: Float[Array, " M"], before: Float[Array, " M"]) -> Float[Array, " M"]:
    """The sum of all updates to come in each segment, if they fall at the rate that they just did."""
    rate = jnp.where(now == 0, 0, now / jnp.where(before > 0, before, 1))
    rate = jnp.where((before == 0) & (now > 0), jnp.inf, rate)
    return jnp.where(now == 0, 0, jnp.where(rate < 1, now * rate / (1 - jnp.minimum(rate, 0.999)), jnp.inf))
