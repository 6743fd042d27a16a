"""When an iteration on all steps has converged, and when it never will."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._scan import row_at
from ._stretches import cut, num_stretches, spread, stretch_maxima
from ._tolerance import first_failure, Tolerance


# Exact Newton iteration is given up after this many iterations in which neither the update halved nor the solved part
# grew. Any iteration is, after as many in which the step after the solved part cannot be evaluated.
_PATIENCE = 10
# The rate of convergence is measured in so many stretches of the sequence.
_STRETCHES = 64
# A smaller update, in epsilons of the state's size, is noise: no rate is read off it.
_NOISE = 16.0


class Progress(eqx.Module):
    """What an iteration has achieved.

    **Attributes:**

    - `update`: the largest entry of the last update, in units of the tolerance.
    - `prefix`: the number of leading steps that have converged.
    - `stretches`: the largest entry of the last update in each of 64 stretches of the sequence.
    - `terminate`, `diverged`: whether to stop; whether in failure.
    """

    update: Float[Array, ""]
    best_update: Float[Array, ""]
    stretches: Float[Array, " M"]
    prefix: Int[Array, ""]
    best_prefix: Int[Array, ""]
    stalled: Int[Array, ""]
    terminate: Bool[Array, ""]
    diverged: Bool[Array, ""]

    @classmethod
    def start(cls, num_steps: int, dtype) -> "Progress":
        """Before the first iteration."""
        infinite = jnp.array(jnp.inf, dtype)
        zero, false = jnp.array(0), jnp.array(False)
        stretches = jnp.full(num_stretches(num_steps, _STRETCHES), jnp.inf, dtype)
        return cls(infinite, infinite, stretches, zero, zero, zero, false, false)

    def after(
        self,
        tolerance: Tolerance,
        r: Float[Array, " N D"],
        d: Float[Array, " N D"],
        taken: Bool[Array, " N"],
        scale: Float[Array, " N D"],
        size: Float[Array, " N D"],
        exact: bool,
    ) -> "Progress":
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
        stretches = stretch_maxima(jnp.where(taken, jnp.where(noise, 0, error), jnp.inf), _STRETCHES)

        small = taken & (error <= 1)
        at_rounding = taken & tolerance.at_rounding(r, size) & tolerance.resolved(d, scale, size)
        if not exact:
            # An update of linear convergence is the first term of a geometric series. It must be small in total; and so
            # must what the defects add up to if nothing forgets them.
            # The sums are compared at the ends of stretches, with the size at their beginnings.
            scales = cut(scale, _STRETCHES)[:, 0]
            total = jnp.cumsum(jnp.sum(jnp.abs(cut(r, _STRETCHES)), axis=1), axis=0)
            drift = jnp.cumsum(jnp.sum(cut(r, _STRETCHES), axis=1), axis=0)
            forgotten = (_remaining(stretches, self.stretches) <= 1) & (tolerance.error(total, scales) <= 1)
            small = small & spread(forgotten, num_steps, _STRETCHES)
            at_rounding = at_rounding & spread(tolerance.resolved(drift, scales, scales), num_steps, _STRETCHES)
        prefix = first_failure(small | at_rounding)

        falling = update <= 0.25 * self.update
        converged = jnp.all(small) | (jnp.all(small | at_rounding) & ~falling)

        progress = (update <= 0.5 * self.best_update) | (prefix >= self.best_prefix + max(num_steps // 64, 1))
        if not exact:
            # How slow is slow is the user's choice of method. What cannot be evaluated will not become right.
            stuck = ~jnp.all(jnp.isfinite(row_at(r, prefix)))
            progress = ~stuck | (prefix > self.best_prefix)
        stalled = jnp.where(progress, 0, self.stalled + 1)
        diverged = ~converged & (stalled >= _PATIENCE)
        return Progress(
            update=update,
            best_update=jnp.where(progress, jnp.fmin(update, self.best_update), self.best_update),
            stretches=stretches,
            prefix=prefix,
            best_prefix=jnp.where(progress, jnp.maximum(prefix, self.best_prefix), self.best_prefix),
            stalled=stalled,
            terminate=converged | diverged,
            diverged=diverged,
        )


def _remaining(now: Float[Array, " M"], before: Float[Array, " M"]) -> Float[Array, " M"]:
    """The sum of all updates to come in each stretch, if they fall at the rate that they just did."""
    rate = jnp.where(now == 0, 0, now / jnp.where(before > 0, before, 1))
    rate = jnp.where((before == 0) & (now > 0), jnp.inf, rate)
    return jnp.where(now == 0, 0, jnp.where(rate < 1, now * rate / (1 - jnp.minimum(rate, 0.999)), jnp.inf))
