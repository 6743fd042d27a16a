"""What an iteration expects of the steps ahead of it."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from .._scan import AbstractTransitions, DenseTransitions, product_by_segments
from ._segments import num_segments, repeat_segments, segment_maxima
from ._tolerance import num_leading_true, Tolerance


# Contraction is watched in so many segments of the sequence; growth is put together from fewer.
_NUM_SEGMENTS = 512
_NUM_GROWTH_SEGMENTS = 64


class ContractionMonitor(eqx.Module):
    """How perturbations grow over a sequence of steps, and up to which of them Newton's method contracts.

    Where the dynamics amplify perturbations, a guess is good for a segment of time only: beyond it an update is larger
    than the region in which the linearisation means anything. There is no constant in that test: an update is expected to
    be smaller than the one before (Deuflhard's natural monotonicity), over the first step to any that is still iterated on.

    **Attributes:**

    - `horizon`: the number of leading steps that are iterated on.
    - `maxima`: the largest entry of the last update up to each of 512 places, in units of the tolerance.
    - `predicted`: how many iterations it should take, judged after the first.
    - `growth`: under a limit, the logarithm of the growth of a random perturbation, at the first iterate.
    - `hopeless`: whether it is above the limit.

    ??? cite "References"

        Deuflhard, "Newton methods for nonlinear problems", Springer (2004), section 2.1.

        Gonzalez, Kozachkov, Zoltowski, Clarkson, Linderman, "Predictability enables parallelization of nonlinear state
        space models", arXiv 2508.16817 (2025).
    """

    horizon: Int[Array, ""]
    maxima: Float[Array, " M"]
    predicted: Int[Array, ""]
    growth: Float[Array, ""] | None
    growth_exceeded: Bool[Array, ""]
    first: Bool[Array, ""]

    @classmethod
    def start(cls, num_steps: int, dtype, limited: bool) -> "ContractionMonitor":
        """Before the first iteration."""
        return cls(
            horizon=jnp.array(num_steps),
            maxima=jnp.full(num_segments(num_steps, _NUM_SEGMENTS), jnp.inf, dtype),
            predicted=jnp.array(0),
            growth=jnp.array(jnp.nan, dtype) if limited else None,
            growth_exceeded=jnp.array(False),
            first=jnp.array(True),
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
        reach: Int[ArrayLike, ""],
    ) -> "ContractionMonitor":
        """After one more iteration.

        **Arguments:** the Jacobians; the update, the steps to which it was applied, those on which it is rounding; what
        small means; the size of the states; the largest growth with which to go on, if there is a limit; the number of
        leading steps over which it is measured.
        """
        num_steps = d.shape[0]
        growth, growth_exceeded = self.growth, self.growth_exceeded
        if growth is not None and max_growth is not None:
            known = growth
            growth = lax.cond(self.first, lambda: growth_over(transitions, reach), lambda: known)
            growth_exceeded = ~(growth <= max_growth)
        horizon = jnp.minimum(self.horizon, num_leading_true(applied))
        error = jnp.where((jnp.arange(num_steps) < horizon) & ~at_rounding, tolerance.error(d, scale), 0)
        maxima = lax.cummax(segment_maxima(error, _NUM_SEGMENTS))
        contracts = (maxima < self.maxima) | (maxima <= 1)
        horizon = jnp.minimum(horizon, num_leading_true(repeat_segments(contracts, num_steps, _NUM_SEGMENTS)))

        ahead = jnp.arange(num_steps) < horizon
        relative = jnp.max(jnp.where(ahead[:, None] & (scale > 0), jnp.abs(d) / jnp.where(scale > 0, scale, 1), 0))
        predicted = jnp.where(self.first, _iterations(relative, tolerance), self.predicted)
        return ContractionMonitor(horizon, maxima, predicted, growth, growth_exceeded, jnp.array(False))


def growth_over(transitions: AbstractTransitions, steps: Int[ArrayLike, ""]) -> Float[Array, ""]:
    """The logarithm of the growth of a random perturbation over so many leading steps.

    Cost: `N` products of matrices.
    """
    A = transitions.dense()
    # The first matrix multiplies no unknown, and is not in a residual's Jacobian.
    index = jnp.arange(A.shape[0])[:, None, None]
    A = jnp.where((index > 0) & (index < steps), A, jnp.eye(A.shape[-1], dtype=A.dtype))
    return product_by_segments(DenseTransitions(A), _NUM_GROWTH_SEGMENTS).log_growth()


def _iterations(relative: Float[Array, ""], tolerance: Tolerance) -> Int[Array, ""]:
    """Of a method whose next error is the square of the last, until one is below the tolerance. The first has been made."""
    target = jnp.maximum(jnp.asarray(tolerance.rtol, relative.dtype), 4 * tolerance.eps)
    ratio = jnp.log(target) / jnp.log(jnp.clip(relative, jnp.finfo(relative.dtype).tiny, 0.5))
    return 1 + jnp.ceil(jnp.log2(jnp.maximum(ratio, 1))).astype(int)
