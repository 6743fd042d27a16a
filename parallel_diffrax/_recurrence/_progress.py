"""When an iteration on all steps has converged, and when it never will."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
        stretches = jnp.full(_stretches(jnp.zeros(num_steps)).shape[0], jnp.inf, dtype)
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
        stretches = stretch_maxima(jnp.where(taken, jnp.where(noise, 0, error), jnp.inf))

        small = taken & (error <= 1)
        at_rounding = taken & tolerance.at_rounding(r, size) & tolerance.resolved(d, scale)
        if not exact:
            # An update of linear convergence is the first term of a geometric series. It must be small in total; and so
            # must what the defects add up to if nothing forgets them.
            # The sums are compared at the ends of stretches, with the size at their beginnings.
            scales = _stretches(scale)[:, 0]
            total = jnp.cumsum(jnp.sum(jnp.abs(_stretches(r)), axis=1), axis=0)
            drift = jnp.cumsum(jnp.sum(_stretches(r), axis=1), axis=0)
            forgotten = (_remaining(stretches, self.stretches) <= 1) & (tolerance.error(total, scales) <= 1)
            small = small & spread(forgotten, num_steps)
            at_rounding = at_rounding & spread(tolerance.resolved(drift, scales), num_steps)
        prefix = first_failure(small | at_rounding)

        falling = update <= 0.25 * self.update
        converged = jnp.all(small) | (jnp.all(small | at_rounding) & ~falling)

        progress = (update <= 0.5 * self.best_update) | (prefix >= self.best_prefix + max(num_steps // 64, 1))
        if not exact:
            # How slow is slow is the user's choice of method. What cannot be evaluated will not become right.
            stuck = ~jnp.all(jnp.isfinite(r[jnp.minimum(prefix, num_steps - 1)]))
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


def _stretches(x: Float[Array, " N *D"], most: int = _STRETCHES) -> Float[Array, " M n *D"]:
    """The sequence in so many stretches, or fewer, the last padded with zeros."""
    num_steps = x.shape[0]
    length = -(-num_steps // most)
    count = -(-num_steps // length)
    return jnp.pad(x, [(0, count * length - num_steps)] + [(0, 0)] * (x.ndim - 1)).reshape(count, length, *x.shape[1:])


def stretch_maxima(x: Float[Array, " N"], most: int = _STRETCHES) -> Float[Array, " M"]:
    """The largest of non-negative numbers in each of at most so many stretches."""
    return jnp.max(_stretches(x, most), axis=1)


def spread(x: Bool[Array, " M"], num_steps: int, most: int = _STRETCHES) -> Bool[Array, " N"]:
    """What holds of a stretch for all of its steps."""
    return jnp.repeat(x, -(-num_steps // most))[:num_steps]


def _remaining(now: Float[Array, " M"], before: Float[Array, " M"]) -> Float[Array, " M"]:
    """The sum of all updates to come in each stretch, if they fall at the rate that they just did."""
    rate = jnp.where(now == 0, 0, now / jnp.where(before > 0, before, 1))
    rate = jnp.where((before == 0) & (now > 0), jnp.inf, rate)
    return jnp.where(now == 0, 0, jnp.where(rate < 1, now * rate / (1 - jnp.minimum(rate, 0.999)), jnp.inf))
