"""The same method on a coarser grid."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp

from ..._recurrence import Prediction
from ..._scan import check_integer, row_at
from ._assessment import assess, GOOD
from ._base import AbstractPredictor, ConstantPredictor
from ._coarse_grid import interpolate, num_coarse_steps, solve_coarse


# Below this fraction of `GOOD`, try twice the step size.
_BETTER = 1 / 16


class CoarsePredictor(AbstractPredictor):
    """Steps the base solver through a subset of the fine grid, in sequence, and interpolates between. The default predictor.

    The interpolation is cubic, or linear where the solution is not smooth. An explicit solver of order 1 or 2 makes each
    coarse step with four step sizes, extrapolated to the fine one.

    The number of coarse steps is found by trial. The guess is put into the equations of the fine steps. It is good if the
    sum of the defects is at most 0.3 % of the solution's size. If it is not, the coarse steps are halved, as long as the
    last trial made the guess twice as good (or a trial was not finite) and all trials together make at most `max_share N`
    coarse steps. From where the last guess is useless, it repeats the last useful state: linear and strongly damped
    problems converge from that. `N` is the number of fine steps of the base solver. (In multiple shooting in kernels, which
    `AdaptivePolicy` describes, each attempt has one trial.)

    **Arguments:**

    - `num_steps`: the number of coarse steps of the first trial, at most `max_share N`. The default is `N / 16`, at most
        1024. With more than `max_share N`, or with the default where `N < 16`, the guess is the initial state.
    - `max_share`: the largest number of coarse steps as a fraction of `N`, in `(0, 1]`.

    **Cost:** the coarse steps in sequence; per trial, an interpolation and a residual of all fine steps, in parallel.

    **Raises:** `TypeError` or `ValueError` if `num_steps` is not a positive integer, `ValueError` if `max_share` is not in
    `(0, 1]`.
    """

    num_steps: int | None = eqx.field(static=True, default=None)
    max_share: float = eqx.field(static=True, default=0.25)

    def __check_init__(self):
        check_integer("CoarsePredictor", "num_steps", self.num_steps, "the number of coarse steps", optional=True)
        if not isinstance(self.max_share, (int, float)) or not 0 < self.max_share <= 1:
            raise ValueError(
                f"`CoarsePredictor(max_share={self.max_share!r})`: the number of coarse steps as a fraction of the fine "
                "steps; expected a number in (0, 1]."
            )

    def predict(self, window, recurrence, start_level):
        substeps = window.step_map.num_substeps
        strides = self._strides(window.num_steps, substeps)
        if len(strides) == 0:
            return ConstantPredictor().predict(window, recurrence, start_level)
        capacity = num_coarse_steps(window.num_steps, strides[-1])
        first = jnp.clip(jnp.asarray(start_level), 0, len(strides) - 1)
        num_fine = jnp.asarray(window.count, float)

        def keep_trying(carry):
            trial, _, _, score, before, steps = carry
            improves = ~(score > 0.5 * before) | ~jnp.isfinite(score)
            more = (trial < len(strides)) & ~(score <= GOOD) & improves
            cost = num_fine / jnp.asarray(strides)[jnp.minimum(trial, len(strides) - 1)].astype(float)
            return (trial == first) | (more & (steps.astype(float) + cost <= self.max_share * substeps * num_fine))

        def body(carry):
            trial, _, _, score, before, steps = carry
            stride = jnp.asarray(strides)[trial]
            nodes, made = solve_coarse(recurrence, window, stride, capacity)
            guess = interpolate(recurrence, window, nodes, stride)
            before = jnp.where(jnp.isfinite(score), score, before)
            return trial + 1, guess, *assess(recurrence, guess), before, steps + made

        guess = jnp.zeros((recurrence.length, *recurrence.init.shape), recurrence.init.dtype)
        infinite = jnp.array(jnp.inf, guess.dtype)
        tried, guess, useful, score, _, steps = lax.while_loop(
            keep_trying, body, (first, guess, jnp.array(0), infinite, infinite, jnp.array(0))
        )
        # The next segment begins with the step size that was good, or with twice or half the last one.
        start_level = jnp.where(score <= GOOD, jnp.where(score <= _BETTER * GOOD, tried - 2, tried - 1), tried)
        last = jnp.where(useful > 0, row_at(guess, jnp.maximum(useful - 1, 0)), recurrence.init)
        guess = jnp.where((jnp.arange(recurrence.length) < useful)[:, None], guess, last[None])
        return Prediction(guess, steps, jnp.where(useful > 0, useful, recurrence.length), start_level)

    @property
    def predicts_at_once(self):
        return True

    def predict_at_once(self, window, recurrence, start_level):
        strides = self._strides(window.num_steps, window.step_map.num_substeps)
        if len(strides) == 0:
            return ConstantPredictor().predict(window, recurrence, start_level)
        level = jnp.clip(jnp.asarray(start_level), 0, len(strides) - 1)
        stride = jnp.asarray(strides)[level]
        nodes, steps = solve_coarse(recurrence, window, stride, num_coarse_steps(window.num_steps, strides[-1]))
        guess = interpolate(recurrence, window, nodes, stride)
        finer = jnp.minimum(level + 1, len(strides) - 1)
        return Prediction(guess, steps, jnp.array(recurrence.length), level, finer)

    def _strides(self, num_steps: int, substeps: int) -> list[int]:
        """The number of steps, of `substeps` steps of the base solver each, in a coarse step for each trial: halved as long
        as `max_share` allows."""
        sequential = num_steps * substeps
        first = min(sequential // 16, 1024, num_steps) if self.num_steps is None else min(self.num_steps, num_steps)
        if first == 0:
            return []
        stride, strides = -(-num_steps // first), []
        while stride >= 1 and num_coarse_steps(num_steps, stride) <= self.max_share * sequential:
            strides.append(stride)
            stride //= 2
        return strides
