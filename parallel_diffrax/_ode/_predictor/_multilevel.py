"""Newton's method on coarse grids, for the guess on the fine one."""

import math

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Int

from ..._recurrence import ParallelNewton, Prediction, Recurrence
from ..._scan import check_instance, check_integer
from .._window import Window
from ._assessment import assess, evaluate_unless, GOOD
from ._base import AbstractPredictor
from ._coarse import CoarsePredictor
from ._coarse_grid import coarse_step, interpolate, num_coarse_steps, solve_coarse


# Each grid has at most about this many times the steps of the previous one.
_RATIO = 8
# The tolerance on each grid. The error on the next grid is its square, and the discretisation error of the grid is larger.
_TOLERANCE = 1e-3
_MAX_ITERATIONS = 6


class MultilevelPredictor(AbstractPredictor):
    """Nested iteration: a few large steps in sequence, then Newton's method on ever finer grids.

    Use it where steps in sequence are slow (a large state, a neural network as the field), and for very many steps. It makes
    so few steps in sequence that they no longer dominate the time, however many fine steps there are.

    The base solver makes `num_steps` large steps in sequence. Each finer grid has at most about eight times the steps of
    the one before. Newton's method solves all steps of a grid at once, from the interpolated solution on the grid before.
    The guess is interpolated from the last of these grids. If it is not good (if the large steps are unstable, for
    example), `predictor` makes another.

    **Arguments:**

    - `num_steps`: the number of steps made in sequence. The default is `N / 16`, at most 512.
    - `predictor`: makes the guess if this predictor fails.

    **Cost:** `num_steps` steps in sequence; on each of about `log8(N / num_steps)` grids two or three iterations and an
    interpolation, in parallel. Each grid adds the compile time of another solve.

    **Raises:** `TypeError` or `ValueError` if `num_steps` is not a positive integer; `TypeError` if `predictor` is not a
    predictor; `ValueError` if it is a `WarmStart`.

    ??? cite "Reference"

        Deuflhard, "Newton methods for nonlinear problems", Springer (2004), chapter 8: nested iteration.
    """

    num_steps: int | None = eqx.field(static=True, default=None)
    predictor: AbstractPredictor = CoarsePredictor()

    def __check_init__(self):
        name = "MultilevelPredictor"
        check_integer(name, "num_steps", self.num_steps, "the number of sequential steps", optional=True)
        check_instance(name, "predictor", self.predictor, AbstractPredictor, "CoarsePredictor()")
        if self.predictor.stored_windows > 0:
            raise ValueError(
                f"`MultilevelPredictor(predictor={self.predictor!r})`: this predictor would not receive the trajectory of "
                "the previous solve. Use `WarmStart(MultilevelPredictor())`."
            )

    def strides(self, num_steps: int) -> list[int]:
        """The number of fine steps in one step of each grid, from the coarsest grid on."""
        first = min(num_steps // 16, 512) if self.num_steps is None else min(self.num_steps, num_steps)
        if first < 1:
            return []
        total = num_coarse_steps(num_steps, first)
        levels = max(1, math.ceil(math.log(total, _RATIO) - 1e-9))
        strides = [round(total ** (k / levels)) for k in range(levels, 0, -1)]
        return [stride for stride in dict.fromkeys(strides) if stride > 1]

    def predict(self, window, recurrence, start_level):
        strides = self.strides(window.num_steps)
        if len(strides) == 0:
            return self.predictor.predict(window, recurrence, start_level)
        # Start level 0 means this predictor, and `k + 1` means level `k` of the other one: once the other was needed, later
        # segments use it directly.
        blank = jnp.zeros((recurrence.length, *recurrence.init.shape), recurrence.init.dtype)
        nothing = Prediction(blank, jnp.array(0), jnp.array(0), jnp.asarray(start_level)), jnp.array(False)

        def nested():
            guess, steps = self._nested(window, recurrence, strides)
            useful, score = assess(recurrence, guess)
            return Prediction(guess, steps, useful, jnp.asarray(start_level)), score <= GOOD

        tried, good = evaluate_unless(jnp.asarray(start_level) > 0, nothing, nested)

        def other():
            found = self.predictor.predict(window, recurrence, jnp.maximum(jnp.asarray(start_level) - 1, 0))
            return eqx.tree_at(
                lambda p: (p.steps, p.start_level), found, (found.steps + tried.steps, found.start_level + 1)
            )

        return evaluate_unless(good, tried, other)

    def _nested(self, window: Window, recurrence: Recurrence, strides: list[int]):
        """The guess, and the number of steps made in sequence."""
        stride, *finer = strides
        nodes, steps = solve_coarse(recurrence, window, jnp.array(stride), num_coarse_steps(window.num_steps, stride))
        for following in finer:
            level, last = _level(window, recurrence, following)
            guess, init = interpolate(recurrence, window, nodes, jnp.array(stride), last), level.init[None]
            found = optx.root_find(
                lambda y, recurrence: recurrence.residual(y),
                ParallelNewton(rtol=_TOLERANCE),
                jnp.where(jnp.all(jnp.isfinite(guess), axis=1, keepdims=True), guess, init),
                args=level,
                max_steps=_MAX_ITERATIONS,
                throw=False,
            )
            nodes, stride = jnp.concatenate([init, found.value]), following
        return interpolate(recurrence, window, nodes, jnp.array(stride)), steps


def _level(window: Window, recurrence: Recurrence, stride: int) -> tuple[Recurrence, Int[Array, " n"]]:
    """The window in steps of `stride` fine steps each, and the index of the last fine step in each."""
    count = num_coarse_steps(window.num_steps, stride)
    index = jnp.minimum(jnp.arange(count + 1) * stride, window.num_steps)
    ts, num_fine = window.ts[index], jnp.maximum(jnp.diff(index), 1)
    if recurrence.stages is not None:
        coarse = Window.make(window.step_map, window.interpolation_cls, ts, window.y0, count).recurrence()
    else:
        step = coarse_step(recurrence, window)
        coarse = Recurrence.make(step, recurrence.init, (ts[:-1], ts[1:], num_fine), count)
    return coarse, index[1:] - 1
