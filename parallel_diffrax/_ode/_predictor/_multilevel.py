"""Newton's method on coarse grids, for the guess on the fine one."""

import math

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float, Int

from ..._recurrence import ParallelNewton, Prediction, Recurrence
from ..._scan import check_instance, check_integer
from .._window import Window
from ._base import AbstractPredictor, evaluate_unless
from ._coarse import assess, coarse_step, CoarsePredictor, GOOD, interpolate, solve_coarse


# Each level has at most so many times the steps of the one before.
_RATIO = 8
# The levels are solved to this tolerance: the next one's error is its square, and that of the grid is larger.
_TOLERANCE = 1e-3
_MAX_ITERATIONS = 6


class MultilevelPredictor(AbstractPredictor):
    """Steps the base solver through a few large steps in sequence; solves ever finer grids by Newton's method, all steps of
    a grid at once, each from the solution on the grid before; and interpolates the last one.

    So few steps are made in sequence that they no longer dominate, however many fine ones there are: for steps that are
    slow in sequence (a large state, a field that is a neural network) and for very many. The grids have `num_steps`
    steps, and at most eight times as many from one to the next.

    Where the guess that comes out is not one (the large steps are unstable, say), `predictor` makes another.

    **Arguments:**

    - `num_steps`: the number of steps made in sequence. The default is one in 16 fine steps, and at most 512.
    - `predictor`: makes the guess where this one fails.

    Cost: `num_steps` steps in sequence; on each of `log8(N / num_steps)` grids two or three iterations and an interpolation,
    in parallel. Compile time: that of another solve for each grid.

    ??? cite "Reference"

        Deuflhard, "Newton methods for nonlinear problems", Springer (2004), chapter 8: nested iteration.
    """

    num_steps: int | None = eqx.field(static=True, default=None)
    predictor: AbstractPredictor = CoarsePredictor()

    def __check_init__(self):
        name = "MultilevelPredictor"
        check_integer(name, "num_steps", self.num_steps, "the number of sequential steps", optional=True)
        check_instance(name, "predictor", self.predictor, AbstractPredictor, "CoarsePredictor()")
        if self.predictor.memory > 0:
            raise ValueError(
                f"`MultilevelPredictor(predictor={self.predictor!r})`: it would not be told the earlier trajectory. Use "
                "`WarmStart(MultilevelPredictor())`."
            )

    def strides(self, num_steps: int) -> list[int]:
        """How many fine steps make one of each grid, from the coarsest on."""
        first = min(num_steps // 16, 512) if self.num_steps is None else min(self.num_steps, num_steps)
        if first < 1:
            return []
        total = -(-num_steps // first)
        levels = max(1, math.ceil(math.log(total, _RATIO) - 1e-9))
        strides = [round(total ** (k / levels)) for k in range(levels, 0, -1)]
        return [stride for stride in dict.fromkeys(strides) if stride > 1]

    def predict(self, window, recurrence, start_level):
        strides = self.strides(window.num_steps)
        if len(strides) == 0:
            return self.predictor.predict(window, recurrence, start_level)
        # The other predictor's start levels begin at one: where it was needed once, it is asked at once from then on.
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

    def _nested(
        self, window: Window, recurrence: Recurrence, strides: list[int]
    ) -> tuple[Float[Array, " N D"], Int[Array, ""]]:
        """The guess, and the steps made in sequence for it."""
        first, *finer = strides
        nodes, made = solve_coarse(recurrence, window, jnp.array(first), -(-window.num_steps // first))
        stride = first
        for following in finer:
            level = _Level.of(window, recurrence, following)
            guess = interpolate(recurrence, window, nodes, jnp.array(stride), level.last)
            nodes, stride = level.solve(guess), following
        return interpolate(recurrence, window, nodes, jnp.array(stride)), made


class _Level(eqx.Module):
    """The same window in larger steps.

    **Attributes:** the recurrence of the large steps; the last fine step in each.
    """

    recurrence: Recurrence
    last: Int[Array, " n"]

    @classmethod
    def of(cls, window: Window, recurrence: Recurrence, stride: int) -> "_Level":
        """Steps of so many fine ones."""
        count = -(-window.num_steps // stride)
        index = jnp.minimum(jnp.arange(count + 1) * stride, window.num_steps)
        ts, num_fine = window.ts[index], jnp.maximum(jnp.diff(index), 1)
        if recurrence.stages is not None:
            coarse = Window(window.step_map, window.interpolation_cls, ts, window.y0, count)
            return cls(coarse.recurrence(), index[1:] - 1)
        step = coarse_step(recurrence, window)
        inputs = (ts[:-1], ts[1:], num_fine)
        return cls(Recurrence.make(step, recurrence.init, inputs, count), index[1:] - 1)

    def solve(self, guess: Float[Array, " n D"]) -> Float[Array, " n1 D"]:
        """The states between the steps, the initial one first."""
        found = optx.root_find(
            lambda y, recurrence: recurrence.residual(y),
            ParallelNewton(rtol=_TOLERANCE),
            jnp.where(jnp.all(jnp.isfinite(guess), axis=1, keepdims=True), guess, self.recurrence.init),
            args=self.recurrence,
            options={"resolution": float(jnp.finfo(guess.dtype).eps)},
            max_steps=_MAX_ITERATIONS,
            throw=False,
        )
        return jnp.concatenate([self.recurrence.init[None], found.value])
