"""A loose adaptive solve, whose steps become the fine grid."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..._kernels import indexed_loop
from ..._recurrence import Prediction, without_tangents
from ..._scan import with_row
from .._step_map import AbstractEmbeddedSolver
from .._window import Window
from ._base import AbstractPredictor
from ._coarse_grid import hermite, slope_of
from ._jumps import divide, locate_jumps, overshoots


# The next step is this fraction of the step size that the error estimate allows,
_SAFETY = 0.9
# and the ratio to the last step stays between these bounds.
_MIN_FACTOR, _MAX_FACTOR = 0.2, 5.0
# A step that is not finite is retried at this fraction of its size.
_NONFINITE_FACTOR = 0.25
# Error estimates, relative to the tolerance, count as at least this much: smaller ones say little.
_MIN_ERROR = 1e-3
# The guess may leave the range of the trajectory by this fraction of it.
_MARGIN = 0.1


class Trajectory(eqx.Module):
    """The `count` accepted steps of an adaptive solve, in arrays for at most `M`. `steps` counts rejected steps too.

    `ts`, `ys` and `slopes` are the initial time, raveled state and derivative, then those at the end of each step. Entries
    beyond the last step repeat it. `errors` are the error estimates in units of the tolerance, zero beyond the last step.
    """

    ts: Float[Array, " M1"]
    ys: Float[Array, " M1 D"]
    slopes: Float[Array, " M1 D"]
    errors: Float[Array, " M"]
    count: Int[Array, ""]
    steps: Int[Array, ""]


class AdaptivePredictor(AbstractPredictor):
    """Solves the window adaptively in sequence, to a loose tolerance, and adapts the fine grid to the accepted steps.

    Use it for stiff problems, initial transients, sharp transitions, and vector fields that jump in time (doses, switched
    inputs), with or without `jump_ts`. It is for steps that are solved in parallel: under an adaptive step-size controller
    that takes `ParallelSolver(..., policy=AdaptivePolicy())`.

    Each accepted step is divided into equal fine steps with about the same local error, `N` in all, the number of fine steps
    of the window. If `M` steps are accepted with the errors `e_j`, in units of the tolerance, and the error estimate is of
    order `p`, step `j` is divided into about

        1 + (N - M) w_j / sum_i w_i,    w_j = max(e_j, 1e-3)^(1/p).

    The first guess is the cubic through the accepted states with their slopes. It stays within the range of the
    trajectory, extended by 10 %, and a component that keeps its sign in the trajectory keeps it in the guess.

    The loose solve uses `Kvaerno3` for an implicit base solver, `KenCarp3` for an implicit-explicit one. For an explicit
    one it uses the base solver itself, or `Bosh3` if that estimates no errors.

    Where the vector field jumps in time between two accepted steps, the jump is located by bisection. One fine step ends
    just before it and one begins just after it, so that no step sees it. (Stages of `Kvaerno5` reach beyond the end of a
    step. Before a jump its steps shorten by a factor of 5 each.)

    The grid depends on the solution. Derivatives treat the ends of fine steps inside the window as constants. If the loose
    solve does not reach the end of the window in `num_steps` accepted steps, fine steps are equal, and the guess is valid as
    far as the loose solve came.

    **Arguments:** `rtol`, `atol`, the tolerances of the loose solve. A step is accepted if the root mean square of its
    error estimate, in units of `atol + rtol |y|`, is at most 1.

    **Cost:** the steps of the loose solve, in sequence.

    **Raises:** `ValueError` for tolerances that are negative, not finite or both zero; for base solvers other than explicit,
    diagonally implicit and implicit-explicit Runge-Kutta methods; for terms that are not ordinary differential equations.
    """

    rtol: float = eqx.field(static=True, default=1e-3)
    atol: float = eqx.field(static=True, default=1e-6)

    def __check_init__(self):
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf or (self.rtol == 0 and self.atol == 0):
                raise ValueError(
                    f"`AdaptivePredictor({name}={value!r})`: expected a finite Python number of at least 0, and at least "
                    "one of `rtol` and `atol` above 0."
                )

    def prepare(self, window):
        trajectory = self._solve(window, window.num_steps, jnp.array(True))
        embedded_solver = self._embedded_solver(window)
        t0, t1, graded = window.ts[0], window.ts[-1], overshoots(window.step_map)
        ts, ys = trajectory.ts, trajectory.ys
        if graded:
            # The stages of the last step reach beyond the window.
            ts, ys = jnp.append(ts, t1 + (t1 - t0) / 4), jnp.concatenate([ys, ys[-1:]])
        jumps = locate_jumps(slope_of(embedded_solver, window), ts, ys)
        ts = _fine_times(trajectory, jumps.nodes(t0, t1, graded), window, embedded_solver.error_order)
        return ts, _KnownTrajectory(self, trajectory)

    def predict(self, window, recurrence, start_level):
        trajectory = self._solve(window, window.num_steps, jnp.array(True))
        return _prediction(trajectory, window, recurrence, start_level)

    def _embedded_solver(self, window: Window) -> AbstractEmbeddedSolver:
        embedded_solver = window.step_map.embedded_solver
        if embedded_solver is None or not window.step_map.smooth:
            raise ValueError(
                f"`ParallelSolver({type(window.step_map.solver).__name__}(), predictor={self!r})`: the grid can be chosen "
                "by the solution only for explicit, diagonally implicit and implicit-explicit Runge-Kutta methods on "
                "ordinary differential equations. Use `CoarsePredictor()`."
            )
        return embedded_solver

    def _mean_square(self, x: Float[Array, " D"], y: Float[Array, " D"]) -> Float[Array, ""]:
        """The mean square of `x` in units of the tolerance at `y`. Zero counts as zero even if the tolerance is zero."""
        return jnp.mean(jnp.where(x == 0, 0, x / (self.atol + self.rtol * jnp.abs(y))) ** 2)

    def _solve(self, window: Window, capacity: int, wanted: Bool[ArrayLike, ""]) -> Trajectory:
        """The loose solve of a window, in at most `capacity` accepted steps; no step at all if it is not `wanted`."""
        step_map = self._embedded_solver(window)
        ravel, dtype = window.ravel, window.ravel.dtype
        y0 = ravel.ravel(window.y0)
        t0, t1 = window.ts[0], window.ts[-1]
        slope = slope_of(step_map, window)(t0, y0)
        order = max(step_map.error_order, 1)

        def try_step(y, slope, t, end):
            return tuple(map(ravel.ravel, step_map.trial(t, end, *map(ravel.unravel, (y, slope)))))

        trial = without_tangents(try_step, y0, slope, t0, t1)

        # The first step as in Hairer, Norsett and Wanner: an explicit Euler step that changes the state by 1 % of its size,
        # both in units of the tolerance.
        first = 0.01 * jnp.sqrt(self._mean_square(y0, y0)) / jnp.sqrt(self._mean_square(slope, y0))
        first = jnp.where(jnp.isfinite(first) & (first > 0), first.astype(t0.dtype), 1e-6 * (t1 - t0))

        def next_index(t, h, count, steps):
            unfinished = (t < t1) & (count < capacity) & (steps < 4 * capacity)
            return jnp.where(unfinished & (t + h > t), 0, -1)

        def body(carry, _):
            t, y, slope, h, count, steps = carry
            end = jnp.where(t + 1.01 * h >= t1, t1, t + h)
            y1, y_error, slope1 = trial(y, slope, t, end)
            # Mosaic knows logarithm and exponential, but no roots.
            square = self._mean_square(y_error, jnp.maximum(jnp.abs(y), jnp.abs(y1)))
            finite = jnp.isfinite(square) & jnp.all(jnp.isfinite(y1) & jnp.isfinite(slope1))
            accepted = finite & (square <= 1)
            factor = _SAFETY * jnp.exp(jnp.log(jnp.maximum(square, 1e-24)) * (-0.5 / order))
            factor = jnp.where(finite, jnp.clip(factor, _MIN_FACTOR, _MAX_FACTOR), _NONFINITE_FACTOR).astype(h.dtype)
            # The next step overwrites the output of a rejected one.
            output, slot = (end, y1, slope1, square.astype(dtype)), count + 1
            h = factor * (end - t)
            t, y, slope, count = (
                jnp.where(accepted, new, old) for new, old in ((end, t), (y1, y), (slope1, slope), (count + 1, count))
            )
            carry = t, y, slope, h, count, steps + 1
            return carry, output, slot, next_index(t, h, count, steps + 1)

        zero = jnp.zeros((), jnp.int32)
        begin = jnp.where(wanted, next_index(t0, first, zero, zero), -1)
        carry, (*outputs, squares), _ = indexed_loop(body, (t0, y0, slope, first, zero, zero), begin, (), capacity + 1)
        count, steps = (x.astype(jnp.result_type(int)) for x in carry[-2:])
        index = jnp.minimum(jnp.arange(capacity + 1), count)
        ts, ys, slopes = (with_row(output, 0, init)[index] for output, init in zip(outputs, (t0, y0, slope)))
        errors = jnp.sqrt(jnp.where(jnp.arange(capacity) < count, squares[1:], 0))
        return Trajectory(ts, ys, slopes, errors, count, steps)


class _KnownTrajectory(AbstractPredictor):
    """The predictor of a window whose grid was made from `trajectory`, which is the first guess too."""

    predictor: AdaptivePredictor
    trajectory: Trajectory

    def predict(self, window, recurrence, start_level):
        capacity = self.trajectory.errors.shape[0]
        # A later segment starts from another state than the trajectory has there.
        valid = (window.ts[0] == self.trajectory.ts[0]) & (jnp.asarray(window.count) > 0)
        again = self.predictor._solve(window, capacity, ~valid)
        trajectory = jax.tree.map(lambda a, b: jnp.where(valid, a, b), self.trajectory, again)
        return _prediction(trajectory, window, recurrence, start_level)


def _fine_times(trajectory: Trajectory, ends: Float[Array, " m"], window: Window, order: int) -> Float[Array, " N1"]:
    """The ends of the fine steps, among them `ends`. `order` is the order of the error estimate."""
    total = jnp.asarray(window.count)
    made = jnp.arange(window.num_steps) < trajectory.count
    # Numbers of steps in this proportion would give all of them the same error.
    weights = jnp.where(made, jnp.maximum(trajectory.errors, _MIN_ERROR) ** (1 / order), 0)
    density = jnp.concatenate([jnp.zeros(1, weights.dtype), jnp.cumsum(weights)])
    nodes = jnp.sort(jnp.append(trajectory.ts, ends))
    density = jnp.interp(nodes, trajectory.ts, density.astype(nodes.dtype))
    ts, enough = divide(nodes, density, total, window.num_steps)
    return jnp.where(enough & (trajectory.ts[trajectory.count] == window.ts[-1]), ts, window.ts)


def _interval(nodes, x, count: Int[Array, ""], side) -> Int[Array, " n"]:
    """The indices of the intervals between `nodes`, among the first `count`, that contain `x`. `side` is as in
    `searchsorted`."""
    return jnp.clip(jnp.searchsorted(nodes[1:], x, side=side).astype(count.dtype), 0, jnp.maximum(count - 1, 0))


def _prediction(trajectory: Trajectory, window: Window, recurrence, start_level) -> Prediction:
    """The states at the fine times: cubics between the accepted states, within bounds."""
    ts, ys = window.ts[1:], trajectory.ys
    k = _interval(trajectory.ts, ts, trajectory.count, "left")
    t0, t1 = trajectory.ts[k], trajectory.ts[k + 1]
    length = (t1 - t0)[:, None].astype(ys.dtype)
    x = jnp.clip((ts - t0) / jnp.where(t1 > t0, t1 - t0, 1), 0, 1)[:, None].astype(ys.dtype)
    guess = hermite(x, length, ys[k], ys[k + 1], trajectory.slopes[k], trajectory.slopes[k + 1])
    low, high = jnp.min(ys, axis=0, keepdims=True), jnp.max(ys, axis=0, keepdims=True)
    margin = _MARGIN * (high - low)
    guess = jnp.clip(
        guess,
        jnp.where(low >= 0, jnp.maximum(low - margin, 0), low - margin),
        jnp.where(high <= 0, jnp.minimum(high + margin, 0), high + margin),
    )
    valid_steps = jnp.minimum(jnp.sum(ts <= trajectory.ts[trajectory.count]), recurrence.length)
    return Prediction(guess, trajectory.steps, valid_steps, jnp.asarray(start_level))
