"""When an iteration has converged, and on which steps it contracts."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from .._scan import (
    AbstractTransitions,
    DenseTransitions,
    num_segments,
    product_by_segments,
    repeat_segments,
    row_at,
    segment_maxima,
    split_segments,
)
from ._tolerance import num_leading_true, Tolerance


# Newton's method stops in failure after this many iterations in which neither the update halved nor the number of converged
# steps grew. Other methods stop after this many in which the first step that has not converged cannot be evaluated.
_PATIENCE = 10
# Numbers of segments in which the rate of convergence is measured, contraction is monitored, and growth is computed.
_RATE_SEGMENTS = 64
_CONTRACTION_SEGMENTS = 512
_GROWTH_SEGMENTS = 64
# A smaller update, in epsilons of the state's size, is noise, and no rate is measured from it.
_NOISE = 16.0


class ConvergenceMonitor(eqx.Module):
    """The progress of an iteration on all steps.

    `update` is the largest norm of a step's last update, in units of the tolerance; `segments`, the same for each of 64
    segments, infinite where the update was not applied; `num_converged`, the number of leading steps that have converged.
    `best_update` and `best_num_converged` are their best values at the last iteration that made progress, `stalled`
    iterations ago. `terminate` and `diverged` say whether to stop, and whether to stop in failure.
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
        infinite = jnp.array(jnp.inf, dtype)
        zero, false = jnp.array(0), jnp.array(False)
        segments = jnp.full(num_segments(num_steps, _RATE_SEGMENTS), jnp.inf, dtype)
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
        """The monitor after an update `d` from the residual `r`, applied to the steps `applied` (none if it was rejected).
        `scale` and `size` are the scale of the states, and of the numbers that they are computed from; `exact` says whether
        `d` solves the exact linearisation."""
        num_steps = d.shape[0]
        error = tolerance.error(d, scale)
        update = jnp.max(error)
        noise = jnp.all(jnp.abs(d) <= _NOISE * tolerance.eps * scale, axis=1)
        segments = segment_maxima(jnp.where(applied, jnp.where(noise, 0, error), jnp.inf), _RATE_SEGMENTS)

        small = applied & (error <= 1)
        at_rounding = applied & tolerance.at_rounding(r, size) & tolerance.resolved(d, scale, size)
        if not exact:
            # With linear convergence an update is the first term of a geometric series. Its sum must be small. The sum of
            # the defects must be small too, in case the dynamics damp none of them.
            # The sums are compared at the ends of segments, with the scale at their beginnings.
            scales, defects = (split_segments(x, _RATE_SEGMENTS) for x in (scale, r))
            scales = scales[:, 0]
            total = jnp.cumsum(jnp.sum(jnp.abs(defects), axis=1), axis=0)
            drift = jnp.cumsum(jnp.sum(defects, axis=1), axis=0)
            sums_small = (_remaining(segments, self.segments) <= 1) & (tolerance.error(total, scales) <= 1)
            resolved = tolerance.resolved(drift, scales, scales)
            small = small & repeat_segments(sums_small, num_steps, _RATE_SEGMENTS)
            at_rounding = at_rounding & repeat_segments(resolved, num_steps, _RATE_SEGMENTS)
        num_converged = num_leading_true(small | at_rounding)

        falling = update <= 0.25 * self.update
        converged = jnp.all(small) | (jnp.all(small | at_rounding) & ~falling)
        progress = num_converged >= self.best_num_converged + max(num_steps // 64, 1)
        progress = (update <= 0.5 * self.best_update) | progress
        if not exact:
            # A slow method is the user's choice. A step that cannot be evaluated will not converge.
            stuck = ~jnp.all(jnp.isfinite(row_at(r, num_converged)))
            progress = ~stuck | (num_converged > self.best_num_converged)
        stalled = jnp.where(progress, 0, self.stalled + 1)
        diverged = ~converged & (stalled >= _PATIENCE)
        most = jnp.maximum(num_converged, self.best_num_converged)
        return ConvergenceMonitor(
            update=update,
            best_update=jnp.where(progress, jnp.fmin(update, self.best_update), self.best_update),
            segments=segments,
            num_converged=num_converged,
            best_num_converged=jnp.where(progress, most, self.best_num_converged),
            stalled=stalled,
            terminate=converged | diverged,
            diverged=diverged,
        )


def _remaining(now: Float[Array, " M"], before: Float[Array, " M"]) -> Float[Array, " M"]:
    """The sum of all later updates in each segment, if they fall at the rate of the last two."""
    rate = jnp.where(now == 0, 0, now / jnp.where(before > 0, before, 1))
    rate = jnp.where((before == 0) & (now > 0), jnp.inf, rate)
    return jnp.where(now == 0, 0, jnp.where(rate < 1, now * rate / (1 - jnp.minimum(rate, 0.999)), jnp.inf))


class ContractionMonitor(eqx.Module):
    """Confines Newton's method to the leading steps on which it contracts.

    If the dynamics amplify perturbations, a guess is good for a limited time. Beyond it, an update is larger than the region
    in which the linearisation is valid. The test has no constant: on the horizon, every update must be smaller than the one
    before (Deuflhard's natural monotonicity), or below the tolerance. The horizon ends where an update is not.

    `horizon` is the number of leading steps that are iterated on; `maxima`, the running maximum of the last update at the
    end of each of 512 segments, in units of the tolerance; `predicted`, the total number of iterations, as predicted after
    the first; `first` says that no iteration was made. `growth` is the logarithm of the growth of a random perturbation at
    the first iterate, `None` without a limit, and `growth_exceeded` says whether it is above the limit.

    ??? cite "References"

        Deuflhard, "Newton methods for nonlinear problems", Springer (2004), section 2.1.

        Gonzalez, Kozachkov, Zoltowski, Clarkson, Linderman, "Predictability enables parallelization of nonlinear state
        space models", arXiv 2508.16817 (2025).
    """

    horizon: Int[Array, ""]
    maxima: Float[Array, " M"]
    predicted: Int[Array, ""]
    first: Bool[Array, ""]
    growth_exceeded: Bool[Array, ""]
    growth: Float[Array, ""] | None

    @classmethod
    def start(cls, num_steps: int, dtype, limited: bool) -> "ContractionMonitor":
        """The monitor before the first iteration. Growth has a limit if `limited`."""
        return cls(
            horizon=jnp.array(num_steps),
            maxima=jnp.full(num_segments(num_steps, _CONTRACTION_SEGMENTS), jnp.inf, dtype),
            predicted=jnp.array(0),
            first=jnp.array(True),
            growth_exceeded=jnp.array(False),
            growth=jnp.array(jnp.nan, dtype) if limited else None,
        )

    def after(
        self,
        transitions: AbstractTransitions,
        d: Float[Array, " N D"],
        applied: Bool[Array, " N"],
        at_rounding: Bool[Array, " N"],
        tolerance: Tolerance,
        scale: Float[Array, " N D"],
        max_growth: Float[Array, ""] | None,
        growth_steps: Int[ArrayLike, ""],
    ) -> "ContractionMonitor":
        """The monitor after an update `d`, applied to the steps `applied`. It is rounding at the steps `at_rounding`.
        `growth_steps` is the number of leading steps over which growth is measured, and `max_growth` its limit."""
        num_steps = d.shape[0]
        growth, growth_exceeded = self.growth, self.growth_exceeded
        if growth is not None and max_growth is not None:
            growth = lax.cond(self.first, lambda _: growth_over(transitions, growth_steps), lambda known: known, growth)
            growth_exceeded = ~(growth <= max_growth)
        horizon = jnp.minimum(self.horizon, num_leading_true(applied))
        error = jnp.where((jnp.arange(num_steps) < horizon) & ~at_rounding, tolerance.error(d, scale), 0)
        maxima = lax.cummax(segment_maxima(error, _CONTRACTION_SEGMENTS))
        contracts = (maxima < self.maxima) | (maxima <= 1)
        contracts = repeat_segments(contracts, num_steps, _CONTRACTION_SEGMENTS)
        horizon = jnp.minimum(horizon, num_leading_true(contracts))

        ahead = jnp.arange(num_steps) < horizon
        relative = jnp.max(jnp.where(ahead[:, None] & (scale > 0), jnp.abs(d) / jnp.where(scale > 0, scale, 1), 0))
        predicted = jnp.where(self.first, _predicted_iterations(relative, tolerance), self.predicted)
        return ContractionMonitor(horizon, maxima, predicted, jnp.array(False), growth_exceeded, growth)


def growth_over(transitions: AbstractTransitions, num_steps: Int[ArrayLike, ""]) -> Float[Array, ""]:
    """The logarithm of the growth of a random perturbation over the `num_steps` leading steps: `N` products of matrices."""
    A = transitions.dense()
    # The first matrix multiplies no unknown and is not part of the residual's Jacobian.
    index = jnp.arange(A.shape[0])[:, None, None]
    A = jnp.where((index > 0) & (index < num_steps), A, jnp.eye(A.shape[-1], dtype=A.dtype)[None])
    return product_by_segments(DenseTransitions(A), _GROWTH_SEGMENTS).log_growth()


def _predicted_iterations(relative: Float[Array, ""], tolerance: Tolerance) -> Int[Array, ""]:
    """The number of iterations, including the first, until the error is below the tolerance, if each squares it. `relative`
    is the relative size of the first update."""
    target = jnp.maximum(jnp.asarray(tolerance.rtol, relative.dtype), 4 * tolerance.eps)
    ratio = jnp.log(target) / jnp.log(jnp.clip(relative, jnp.finfo(relative.dtype).tiny, 0.5))
    return 1 + jnp.ceil(jnp.log2(jnp.maximum(ratio, 1))).astype(int)
