"""All fine steps of one window: the recurrence to solve, and the outputs at its solution."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._recurrence import Ravel, Recurrence, stop_gradient
from .._scan import preceded_by, with_row
from ._interpolation import join_infos, RepeatedSteps
from ._step_map import AbstractStepMap, IntervalStep, StepOutput


def time_dtype(*ts: ArrayLike):
    """The dtype of these times together, as Diffrax chooses it: that of the floating-point ones, by default a float's."""
    floats = [t for t in ts if jnp.issubdtype(jnp.result_type(t), jnp.floating)]
    return jnp.result_type(*floats) if floats else jnp.result_type(float)


def uniform_times(t0: Float[ArrayLike, ""], t1: Float[ArrayLike, ""], num_steps: int) -> Float[Array, " N1"]:
    """`num_steps + 1` equidistant times from `t0` to `t1`, with the rounding of `diffrax.ConstantStepSize`."""
    index = jnp.arange(num_steps + 1, dtype=jnp.result_type(t0))
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    ts = t0 + (t1 - t0) * (index / num_steps)
    return with_row(ts, -1, t1)


class UniformGrid(eqx.Module):
    """The fine steps of `diffrax.ConstantStepSize`: `count` steps from `t0` to `t1` with the step size `dt0`, of either
    width; endless steps if `t1` is infinite."""

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    dt0: Float[Array, ""]
    count: Int[Array, ""]

    @classmethod
    def make(cls, t0: Float[ArrayLike, ""], t1: Float[ArrayLike, ""], dt0: Float[ArrayLike, ""]) -> "UniformGrid":
        t0, t1, dt0 = jnp.asarray(t0), jnp.asarray(t1), jnp.asarray(dt0)
        # The number of steps that Diffrax makes, which tolerates rounding in `dt0`. It has no derivative, and JAX has no
        # differentiation rule for `nextafter`.
        span, step = lax.stop_gradient((t1 - t0, dt0))
        count = jnp.ceil(span / jnp.nextafter(step, jnp.full_like(step, jnp.inf)))
        # For an empty span, `dt0` may be zero.
        usable = jnp.isfinite(count) & (count > 0)
        return cls(t0, t1, dt0, jnp.where(usable, count, 1).astype(jnp.result_type(int)))

    def ends(self, index: Int[Array, "*n"]) -> Float[Array, "*n"]:
        """The times after `index` steps, with the rounding of Diffrax. All are `t1` from some index on."""
        t0, t1, dt0, finite = self.t0, self.t1, self.dt0, jnp.isfinite(self.t1)
        share = index.astype(t0.dtype)
        span = jnp.where(finite, t1, t0) - t0
        ts = t0 + jnp.where(finite, span * (share / self.count.astype(t0.dtype)), dt0 * share)
        # Diffrax moves the end of a step to `t1` if it is nearly there. It takes the first step as it is given.
        ts = jnp.where((finite & (index >= self.count)) | (ts > before(t1)), t1, ts)
        ts = jnp.where(index == 1, jnp.minimum(t0 + dt0, t1), ts)
        return jnp.where(index <= 0, t0, ts)

    def window_times(
        self, t0: Float[ArrayLike, ""], t1: Float[ArrayLike, ""], num_steps: int
    ) -> tuple[Float[Array, " N1"], Int[Array, ""]]:
        """The ends of the fine steps of a window, padded with `t1`, and their number. A window that is not `num_steps`
        steps of the grid, or the remaining ones, is divided into equal steps."""
        t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
        length = jnp.where(jnp.isfinite(self.t1), (self.t1 - self.t0) / self.count.astype(t0.dtype), self.dt0)
        windows = lax.stop_gradient((t0 - self.t0) / jnp.where(length > 0, length, 1)) / num_steps
        # The first step of a grid may be longer than the others.
        near = jnp.maximum(jnp.round(windows).astype(self.count.dtype) + jnp.arange(-1, 2), 0) * num_steps
        first = near[jnp.argmin(jnp.abs(self.ends(near) - t0))]
        index = jnp.arange(num_steps + 1, dtype=first.dtype)
        ts = self.ends(first + index)
        fits = nearly(ts[0], t0) & nearly(ts[-1], t1) & (ts[-2] <= t1)
        ts = jnp.where(fits, jnp.where(ts < t1, ts, t1), uniform_times(t0, t1, num_steps))
        ts = with_row(with_row(ts, 0, t0), -1, t1)
        return ts, jnp.maximum(jnp.sum(ts[:-1] < t1), 1)


def before(t: Float[Array, ""]) -> Float[Array, ""]:
    """The hundredth floating-point number before `t`."""
    integer = {16: jnp.int16, 32: jnp.int32, 64: jnp.int64}[jnp.finfo(t.dtype).bits]
    bits, lowest = lax.bitcast_convert_type(lax.stop_gradient(t), integer), jnp.iinfo(integer).min
    # As integers in the order of the numbers.
    bits = jnp.where(bits < 0, lowest - bits, bits) - 100
    return lax.bitcast_convert_type(jnp.where(bits < 0, lowest - bits, bits), t.dtype)


def nearly(a: Float[Array, "*n"], b: Float[Array, ""]) -> Bool[Array, "*n"]:
    """Whether times are equal up to rounding: at a jump, Diffrax moves a time to its floating-point neighbour."""
    return jnp.abs(a - b) <= 4 * jnp.finfo(a.dtype).eps * jnp.abs(b)


def listed_times(
    ts: Float[Array, " M1"], t0: Float[ArrayLike, ""], t1: Float[ArrayLike, ""], num_steps: int
) -> tuple[Float[Array, " N1"], Int[Array, ""], Bool[Array, ""]]:
    """Selects the times of one window from the increasing times `ts` of all fine steps.

    Returns `num_steps + 1` times from `t0` to `t1`, padded with `t1`; the number of steps that are not padding; and whether
    `t0` and `t1` are among `ts`, with at least one and at most `num_steps` steps between them.
    """
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    first, last = jnp.argmin(jnp.abs(ts - t0)), jnp.argmin(jnp.abs(ts - t1))
    index = first + jnp.arange(num_steps + 1, dtype=first.dtype)
    times = with_row(jnp.where(index >= last, t1, ts[jnp.minimum(index, last)]), 0, t0)
    near = nearly(ts[first], t0) & nearly(ts[last], t1)
    return times, last - first, near & (first < last) & (last - first <= num_steps)


class Window(eqx.Module):
    """The fine steps of a base solver over one window. Construct it by `Window.make`."""

    step_map: AbstractStepMap
    # The base solver's dense output.
    interpolation_cls: Callable = eqx.field(static=True)
    # The ends of the fine steps, increasing.
    ts: Float[Array, " N1"]
    # The state at `ts[0]`. If the step map has a solver state, the pair of both.
    y0: PyTree[Array]
    # The number of steps. The remaining `N - count` steps, at the end, have length zero.
    count: Int[ArrayLike, ""]
    ravel: Ravel = eqx.field(static=True)

    @classmethod
    def make(
        cls,
        step_map: AbstractStepMap,
        interpolation_cls: Callable,
        ts: Float[Array, " N1"],
        y0: PyTree[Array],
        count: Int[ArrayLike, ""],
    ) -> "Window":
        """The window with the `ravel` of `y0`."""
        return cls(step_map, interpolation_cls, ts, y0, count, Ravel(y0))

    @property
    def num_steps(self) -> int:
        """`N`."""
        return self.ts.shape[0] - 1

    @property
    def made(self) -> Bool[Array, " N"]:
        """Which steps do not have length zero. The field may be infinite where those begin."""
        return jnp.arange(self.num_steps) < self.count

    def segment(
        self, start: Int[ArrayLike, ""], state: Float[Array, " D"], count: Int[ArrayLike, ""], capacity: int
    ) -> "Window":
        """`count` steps from step `start` and the raveled `state` before it, as a window of its own with arrays for
        `capacity` steps."""
        index = jnp.arange(capacity + 1)
        start, count, total = (jnp.asarray(x, index.dtype) for x in (start, count, self.count))
        ts, count = self.ts[start + jnp.minimum(index, count)], jnp.clip(total - start, 0, count)
        return Window(self.step_map, self.interpolation_cls, ts, self.ravel.unravel(state), count, self.ravel)

    def in_intervals(self, length: int) -> "Window":
        """The same time span in intervals of `length` fine steps each, for predictors. The last may be shorter."""
        index = jnp.minimum(jnp.arange(-(-self.num_steps // length) + 1) * length, self.num_steps)
        step_map, count = self.step_map, -(-jnp.asarray(self.count) // length)
        several = IntervalStep(step_map.solver, step_map.terms, step_map, length)
        return Window(several, self.interpolation_cls, self.ts[index], self.y0, count, self.ravel)

    def with_times(self, ts: Float[Array, " N1"] | None) -> "Window":
        """The same window with fine steps that end at these times, if any. Derivatives treat those inside as constants."""
        if ts is None:
            return self
        ts = with_row(with_row(stop_gradient(ts), 0, self.ts[0]), -1, self.ts[-1])
        return eqx.tree_at(lambda window: window.ts, self, ts)

    def stateless(self) -> "Window":
        """The same window with steps that carry no solver state."""
        y0, _ = self.step_map.end(self.y0)
        return Window.make(self.step_map.stateless, self.interpolation_cls, self.ts, y0, self.count)

    def recurrence(self) -> Recurrence:
        """The fine steps as a recurrence of raveled states, with inputs `(ts[i], ts[i + 1])`. It traces the step once, to
        convert its closure: call it once per window."""
        ravel, incremental = self.ravel, self.step_map.has_increment

        def step(y, times):
            t0, t1 = times
            y0 = ravel.unravel(y)
            y1 = ravel.ravel(self.step_map.increment(t0, t1, y0) if incremental else self.step_map(t0, t1, y0).y1)
            # A multi-step method moves even in a step of length zero.
            return jnp.where(t0 < t1, y1, y) if self.step_map.has_solver_state else y1

        inputs = (self.ts[:-1], self.ts[1:])
        return Recurrence.make(step, ravel.ravel(self.y0), inputs, self.num_steps, incremental, self.step_map.stages)

    def evaluate_steps(self, recurrence: Recurrence, y: Float[Array, " N D"], finite: Bool[Array, " N"]) -> StepOutput:
        """Makes every fine step once more from the states `y` of the solution, in parallel. Error estimates and dense output
        become ordinary functions of `y`. A step that is not `finite`, or has length zero, repeats the first step."""
        finite = finite & self.made
        previous, (ts, following) = recurrence.guard(y, finite)
        guess, unravel = stop_gradient(jnp.where(finite[:, None], y, previous)), self.ravel.unravel
        step = lambda t0, t1, y0, y1: self.step_map(t0, t1, unravel(y0), unravel(y1))
        try:
            steps = jax.vmap(step)(ts, following, previous, guess)
        except NotImplementedError:  # a callback without a `vmap_method`
            steps = lax.map(lambda xs: step(*xs), (ts, following, previous, guess))
        infos = join_infos(self.step_map, steps.dense_info, ts, following)
        return StepOutput(steps.y1, steps.y_error, infos, steps.result)

    def repeated_steps(
        self, recurrence: Recurrence, y: Float[Array, " N D"], finite: Bool[Array, " N"]
    ) -> RepeatedSteps:
        """What `evaluate_steps` makes, to be made where dense output is wanted."""
        finite = finite & self.made
        previous, (begins, ends) = recurrence.guard(y, finite)
        return RepeatedSteps.of(
            self.step_map, begins, ends, previous, jnp.where(finite[:, None], y, previous), self.ravel
        )


def window_error(
    window: Window,
    y: Float[Array, " N D"],
    y_error: PyTree | None,
    tolerance: tuple[Float[ArrayLike, ""], Float[ArrayLike, ""]],
    failed: Bool[Array, ""],
) -> PyTree | None:
    """The error estimate of a window: the sum of the magnitudes of its fine steps' estimates; infinite if it failed.

    If errors do not grow, the sum bounds the error at the end of the window.

    With a tolerance `atol + rtol |y|`, each estimate is weighted relative to the tolerance at its own step. The sum is
    relative to the tolerance at the ends of the window, with which step-size controllers compare it. With `atol = 0` the
    estimates are not weighted. That is stricter if the solution is larger in the middle of a window than at both ends.

    `y_error` are the estimates of all fine steps, `tolerance` is `(rtol, atol)`.
    """
    if y_error is None or len(jtu.tree_leaves(y_error)) == 0:
        return y_error
    (init, _), (states, _) = window.step_map.end(window.y0), window.step_map.end(jax.vmap(window.ravel.unravel)(y))
    ravel = Ravel(init)
    # The estimate of a complex state may be real.
    y_error = jtu.tree_map(lambda error, y: error.astype(y.dtype), y_error, init)
    init, y, error = ravel.ravel(init), jax.vmap(ravel.ravel)(states), jnp.abs(jax.vmap(ravel.ravel)(y_error))
    rtol, atol = (jnp.asarray(x, y.dtype) for x in tolerance)

    def scale(begin, end):
        return jnp.where(atol > 0, atol + rtol * jnp.maximum(jnp.abs(begin), jnp.abs(end)), 1)

    error = jnp.where(window.made[:, None], error / scale(preceded_by(init, y), y), 0)
    total = ravel.unravel(jnp.sum(error, axis=0) * scale(init, y[-1]))
    return jtu.tree_map(lambda e: jnp.where(failed, jnp.inf, e), total)
