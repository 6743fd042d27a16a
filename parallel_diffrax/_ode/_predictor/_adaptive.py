"""A loose adaptive solve, whose steps become the fine grid."""

import math
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..._kernels import indexed_loop
from ..._recurrence import Prediction
from ..._scan import with_row
from .._step_map import AbstractEmbeddedSolver
from .._window import Window
from ._base import AbstractPredictor, hermite, slope_of, without_tangents


# The next step is this much shorter than the error estimate allows, and at most so much shorter or longer than the last.
_SAFETY, _SHORTER, _LONGER = 0.9, 0.2, 5.0
# A step that is not finite is tried again so much shorter.
_RETREAT = 0.25
# Fine steps follow the error estimates, relative to the tolerance, down to this; smaller ones say little.
_SMALLEST_ERROR = 1e-3
# The guess may leave the range of the trajectory by this share of it.
_MARGIN = 0.1


class Trajectory(eqx.Module):
    """The accepted steps of an adaptive solve, in arrays for `M`.

    **Attributes:** `ts`, `ys`, `slopes`: times, raveled states and their derivatives at the ends of the steps, from the
    initial one on; `errors`: of each step, in units of the tolerance; `count`: how many there are, beyond which entries
    repeat the last; `steps`: how many were made, rejected ones too.
    """

    ts: Float[Array, " M1"]
    ys: Float[Array, " M1 D"]
    slopes: Float[Array, " M1 D"]
    errors: Float[Array, " M"]
    count: Int[Array, ""]
    steps: Int[Array, ""]


class AdaptivePredictor(AbstractPredictor):
    """Solves the window in sequence with few steps that adapt to the solution, and lays the fine steps where those were
    short: for stiff problems, initial transients, sharp transitions.

    Each accepted step is cut into equal fine ones, as many as its share of the error estimate asks for, so that all fine
    steps have about the same local error, and there are `num_steps` of them. The first guess is the cubic through the
    accepted states with their slopes, kept within 10 % of the range of the trajectory, and from crossing zero in a component
    that does not. The loose solve is by the base solver if that is explicit and estimates errors (else `Bosh3`), by
    `Kvaerno3` if it is implicit, by `KenCarp3` if it is implicit-explicit.

    The grid depends on the solution, but is taken as a fixed division of the window in derivatives, as Diffrax takes the
    steps of an adaptive controller. Where the loose solve does not reach the end of the window in `num_steps` steps, fine
    steps are equally long, and the guess is one as far as it goes.

    **Arguments:**

    - `rtol`, `atol`: the tolerances of the loose solve: the error of a step is at most `atol + rtol |y|` in every component,
        in the root mean square.

    Cost: the steps of the loose solve, in sequence.

    **Raises:** `ValueError` for base solvers and terms whose steps are not those of an ordinary differential equation.
    """

    rtol: float = eqx.field(static=True, default=1e-3)
    atol: float = eqx.field(static=True, default=1e-6)

    def __check_init__(self):
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf or (self.rtol == 0 and self.atol == 0):
                raise ValueError(
                    f"`AdaptivePredictor({name}={value!r})`: expected a Python number of at least 0, and one of the "
                    "tolerances above 0."
                )

    def prepare(self, window):
        trajectory = self._solve(window, window.num_steps, jnp.array(True))
        embedded_solver = cast(AbstractEmbeddedSolver, window.step_map.embedded_solver)
        return _fractions(trajectory, window, embedded_solver.error_order), _KnownTrajectory(self, trajectory)

    def predict(self, window, recurrence, start_level):
        trajectory = self._solve(window, window.num_steps, jnp.array(True))
        return _prediction(trajectory, window, recurrence, start_level)

    def _embedded_solver(self, window: Window) -> AbstractEmbeddedSolver:
        step_map = window.step_map.embedded_solver
        if step_map is None or not window.step_map.smooth:
            raise ValueError(
                f"`ParallelSolver({type(window.step_map.solver).__name__}(), predictor={self!r})`: the grid can be chosen "
                "by the solution only for explicit, diagonally implicit and implicit-explicit Runge-Kutta methods on "
                "ordinary differential equations. Use `CoarsePredictor()`."
            )
        return step_map

    def _norm(self, x: Float[Array, "*N D"], y: Float[Array, "*N D"]) -> Float[Array, "*N"]:
        """The root mean square of `x` in units of the tolerance."""
        return jnp.sqrt(self._square(x, y))

    def _square(self, x, y):
        # Nothing is no error, even where the tolerance is zero.
        scaled = jnp.where(x == 0, 0, x / (self.atol + self.rtol * jnp.abs(y)))
        return jnp.mean(scaled**2, axis=-1)

    def _solve(self, window: Window, capacity: int, wanted: Bool[ArrayLike, ""]) -> Trajectory:
        """The loose solve of a window, in at most `capacity` steps; of nothing, if it is not `wanted`."""
        step_map = self._embedded_solver(window)
        ravel, dtype = window.ravel, window.ravel.dtype
        y0 = ravel.ravel(window.y0)
        t0, t1 = window.ts[0], window.ts[-1]
        slope = slope_of(step_map, window)(t0, y0)
        order = max(step_map.error_order, 1)

        def try_step(y, slope, t, end):
            return tuple(map(ravel.ravel, step_map.trial(t, end, *map(ravel.unravel, (y, slope)))))

        trial = without_tangents(try_step, y0, slope, t0, t1)

        # As Hairer, Norsett and Wanner begin: an explicit step that changes the state by 1 % of what the tolerance resolves.
        first = 0.01 * self._norm(y0, y0) / self._norm(slope, y0)
        first = jnp.where(jnp.isfinite(first) & (first > 0), first, 1e-6 * (t1 - t0)).astype(t0.dtype)

        def next_turn(t, h, count, steps):
            unfinished = (t < t1) & (count < capacity) & (steps < 4 * capacity)
            return jnp.where(unfinished & (t + h > t), 0, -1)

        def body(carry, _):
            t, y, slope, h, count, steps = carry
            end = jnp.where(t + 1.01 * h >= t1, t1, t + h)
            y1, y_error, slope1 = trial(y, slope, t, end)
            # (Powers in operations that Mosaic knows, and no roots.)
            square = self._square(y_error, jnp.maximum(jnp.abs(y), jnp.abs(y1)))
            finite = jnp.isfinite(square) & jnp.all(jnp.isfinite(y1) & jnp.isfinite(slope1))
            accepted = finite & (square <= 1)
            factor = _SAFETY * jnp.exp(jnp.log(jnp.maximum(square, 1e-24)) * (-0.5 / order))
            factor = jnp.where(finite, jnp.clip(factor, _SHORTER, _LONGER), _RETREAT).astype(h.dtype)
            # A step that is rejected is written over by the next.
            row, place = (end, y1, slope1, square.astype(dtype)), count + 1
            h = factor * (end - t)
            t, y, slope, count = (
                jnp.where(accepted, new, old) for new, old in ((end, t), (y1, y), (slope1, slope), (count + 1, count))
            )
            carry = t, y, slope, h, count, steps + 1
            return carry, row, place, next_turn(t, h, count, steps + 1)

        zero = jnp.zeros((), jnp.int32)
        begin = jnp.where(wanted, next_turn(t0, first, zero, zero), -1)
        carry, (*rows, squares) = indexed_loop(body, (t0, y0, slope, first, zero, zero), begin, (), capacity + 1)
        count, steps = (x.astype(jnp.result_type(int)) for x in carry[-2:])
        index = jnp.minimum(jnp.arange(capacity + 1), count)
        ts, ys, slopes = (with_row(rows, 0, init)[index] for rows, init in zip(rows, (t0, y0, slope)))
        errors = jnp.sqrt(jnp.where(jnp.arange(capacity) < count, squares[1:], 0))
        return Trajectory(ts, ys, slopes, errors, count, steps)


class _KnownTrajectory(AbstractPredictor):
    """The predictor of a window whose grid is known: the trajectory that the grid came from is the first guess."""

    predictor: AdaptivePredictor
    trajectory: Trajectory

    def predict(self, window, recurrence, start_level):
        capacity = self.trajectory.errors.shape[0]
        # The state of a later part is a new one to start from.
        known = (window.ts[0] == self.trajectory.ts[0]) & (jnp.asarray(window.count) > 0)
        again = self.predictor._solve(window, capacity, ~known)
        trajectory = jax.tree.map(lambda a, b: jnp.where(known, a, b), self.trajectory, again)
        return _prediction(trajectory, window, recurrence, start_level)


def _fractions(trajectory: Trajectory, window: Window, order: int) -> Float[Array, " N1"]:
    """The ends of the fine steps as fractions of the window. The errors fall with this power of the step size."""
    num_steps, count = window.num_steps, trajectory.count
    t0, t1 = window.ts[0], window.ts[-1]
    made = jnp.arange(num_steps) < count
    # So many steps would all have the same error.
    density = jnp.where(made, jnp.maximum(trajectory.errors, _SMALLEST_ERROR) ** (1 / order), 0)
    share = jnp.cumsum(density) / jnp.sum(density)
    # The first fine step of each accepted one: there is at least one in each.
    begin = jnp.minimum(jnp.arange(1, num_steps + 1), count) + jnp.round((num_steps - count) * share).astype(int)
    begin = jnp.concatenate([jnp.zeros(1, begin.dtype), begin])
    index = jnp.arange(num_steps + 1)
    k = jnp.clip(jnp.searchsorted(begin[1:], index, side="right"), 0, jnp.maximum(count - 1, 0))
    inside = (index - begin[k]) / jnp.maximum(begin[k + 1] - begin[k], 1)
    ts = trajectory.ts[k] + (trajectory.ts[k + 1] - trajectory.ts[k]) * inside.astype(trajectory.ts.dtype)
    complete = trajectory.ts[count] == t1
    fractions = jnp.where(complete, (ts - t0) / (t1 - t0), index / num_steps).astype(ts.dtype)
    return fractions.at[0].set(0).at[-1].set(1)


def _prediction(trajectory: Trajectory, window: Window, recurrence, start_level) -> Prediction:
    """The states at the fine times: cubic between the accepted ones, within bounds."""
    ts, last = window.ts[1:], trajectory.count
    k = jnp.clip(jnp.searchsorted(trajectory.ts[1:], ts, side="left"), 0, jnp.maximum(last - 1, 0))
    t0, t1, y0, y1 = trajectory.ts[k], trajectory.ts[k + 1], trajectory.ys[k], trajectory.ys[k + 1]
    length = (t1 - t0)[:, None].astype(y0.dtype)
    x = jnp.clip((ts - t0) / jnp.where(t1 > t0, t1 - t0, 1), 0, 1)[:, None].astype(y0.dtype)
    guess = hermite(x, length, y0, y1, trajectory.slopes[k], trajectory.slopes[k + 1])
    low, high = jnp.min(trajectory.ys, axis=0), jnp.max(trajectory.ys, axis=0)
    margin = _MARGIN * (high - low)
    guess = jnp.clip(
        guess,
        jnp.where(low >= 0, jnp.maximum(low - margin, 0), low - margin),
        jnp.where(high <= 0, jnp.minimum(high + margin, 0), high + margin),
    )
    reach = jnp.sum(ts <= trajectory.ts[last])
    return Prediction(guess, trajectory.steps, jnp.minimum(reach, recurrence.length), jnp.asarray(start_level))
