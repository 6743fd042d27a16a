"""The two ways to make steps of a recurrence: many at once in parallel, or one after the other."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._scan import AbstractScan, row_at
from ._cost import interval_length, supports_intervals
from ._jacobians import Dense
from ._monitors import growth_over
from ._newton import ParallelNewton
from ._prediction import Prediction
from ._recurrence import Recurrence
from ._root_finder import scan_of, SolveReport, SolveRequest
from ._shooting import ITERATIONS, Shooting
from ._solution import Counts, Segments
from ._stepper import kernels_make, largest_chunk, Stepper
from ._tangents import stop_gradient
from ._tolerance import num_leading_true, Tolerance
from ._verification import Verification


# The length of a buffer of states is a multiple of this, and so of the number of devices if that is a power of two.
_MULTIPLE = 64


class Attempt(eqx.Module):
    """The result of an attempt: a solve of a segment of steps in parallel.

    **Attributes:**

    - `y`: the states, shape `(capacity, D)`.
    - `num_solved`: the number of leading steps whose equations hold to tolerance.
    - `evaluated`: whether the defect of each step is finite, shape `(capacity,)`.
    - `result`: the result of the root finder.
    - `start_level`: the start level of the next attempt of the same capacity.
    - `growth_exceeded`: whether perturbations grow by more than `max_growth`.
    - `counts`: the work.
    - `too_coarse`: whether few steps were solved, and the next attempt has a finer guess.
    """

    y: Float[Array, " C D"]
    num_solved: Int[Array, ""]
    evaluated: Bool[Array, " C"]
    result: optx.RESULTS
    start_level: Int[Array, ""]
    growth_exceeded: Bool[Array, ""]
    counts: Counts
    too_coarse: Bool[Array, ""] | bool = False


def _finite_guess(prediction: Prediction, state: Float[Array, " D"]) -> Float[Array, " C D"]:
    """The predicted states, with the state before the segment in place of those that are not finite."""
    finite = jnp.all(jnp.isfinite(prediction.y), axis=1, keepdims=True)
    return jnp.where(finite, prediction.y, state[None])


class _Notes:
    """What is noted while a program is traced: whether a stepper of the policy has a kernel."""

    has_kernel = False


class RecurrenceDriver(eqx.Module):
    """Makes steps of a recurrence, in parallel or sequentially. A policy decides which.

    **Arguments:**

    - `recurrence`: the steps.
    - `predict`: makes first guesses: `predict(segment, start, count, start_level)` returns a `Prediction` for the `segment`
        of `recurrence` from step `start` with `count` active steps. The first `start_level` is zero. If it has an attribute
        `supports_intervals` that is true, `predict.in_intervals(segment, start, count, length, start_level)` does so for
        intervals of `length` steps.
    - `root_finder`: any Optimistix root finder that solves the residual of all steps.
    - `max_steps`: the largest number of iterations of an attempt.
    - `eps`: the machine epsilon of the states.
    - `step_size`: the mean length of a step, in units of time.
    - `count`: the number of steps, if not all: the steps after those leave the state unchanged.
    - `kernels`: the backend of the kernels that make sequential steps, `off`, or `auto`.
    - `meter`: shows the share of the steps that are done: an object with Diffrax's `init()`, `step(state, progress)` and
        `close(state)`. `None` shows nothing.
    """

    recurrence: Recurrence
    predict: Callable
    root_finder: optx.AbstractRootFinder
    max_steps: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    step_size: Float[ArrayLike, ""] = 1.0
    count: Int[ArrayLike, ""] | None = None
    meter: Any = None
    kernels: str = eqx.field(static=True, default="auto")
    _notes: _Notes = eqx.field(static=True, default_factory=_Notes)

    @property
    def scan(self) -> AbstractScan:
        """The scan of the root finder. It also says how arrays over the steps are placed on devices."""
        return scan_of(self.root_finder)

    @property
    def exact(self) -> bool:
        """Whether the root finder is Newton's method with exact Jacobians."""
        return getattr(self.root_finder, "exact", False)

    @property
    def length(self) -> int:
        """The number of steps `N`."""
        return self.recurrence.length

    @property
    def end(self) -> int | Int[Array, ""]:
        """The number of steps to make."""
        return self.length if self.count is None else jnp.asarray(self.count, jnp.result_type(int))

    @property
    def init(self) -> Float[Array, " D"]:
        """The state before the first step."""
        return self.recurrence.init

    @property
    def _chunk(self) -> int:
        """The largest useful number of sequential steps at once."""
        return min(self.length, largest_chunk(self.kernels))

    def start_meter(self) -> PyTree:
        """The state of the meter before the first step."""
        return None if self.meter is None else self.meter.init()

    def update_meter(self, meter_state: PyTree, num_done: Int[ArrayLike, ""]) -> PyTree:
        """Shows that the first `num_done` steps are done. Returns the new state of the meter."""
        if self.meter is None:
            return None
        done, end = (jnp.asarray(x, jnp.result_type(float)) for x in (num_done, self.end))
        return self.meter.step(meter_state, done / end)

    def close_meter(self, meter_state: PyTree):
        """Closes the meter after the last step."""
        if self.meter is not None:
            self.meter.close(meter_state)

    def solve_in_parallel(
        self,
        start: Int[ArrayLike, ""],
        state: Float[Array, " D"],
        count: Int[ArrayLike, ""],
        capacity: int,
        start_level: Int[ArrayLike, ""] = 0,
        monitor_contraction: bool = False,
        max_growth: Float[Array, ""] | None = None,
    ) -> Attempt:
        """Solves `count` steps from step `start` together, or the leading ones that converge.

        **Arguments:**

        - `start`, `state`, `count`: the first step, the state before it, and the number of steps.
        - `capacity`: the length of the arrays, at least `count`.
        - `start_level`: that of an earlier attempt of the same capacity, or zero.
        - `monitor_contraction`: whether to iterate only on the leading steps on which Newton's method contracts, and to
            measure the growth of perturbations.
        - `max_growth`: if given, the attempt ends after one iteration if the logarithm of the growth over all `count` steps
            is larger.

        **Returns:** an `Attempt`.

        **Cost:** the guess; the iterations; one evaluation of all steps to verify the equations. Each call of this method is
        compiled separately, and takes most of the time to compile: a policy should contain few.
        """
        segment = self.recurrence.segment(start, count, state, capacity)
        segment = segment.with_inputs(self.scan.place(segment.inputs))
        # A step may close over arrays with tangents, which Optimistix would follow through the guess.
        prediction = stop_gradient(self.predict(segment, start, count, start_level))
        guess = self.scan.place(_finite_guess(prediction, state))
        # Growth is measured over the valid part of the guess, and extrapolated to all steps at the same rate.
        # (In a batch, `count` is zero for a member that is done. Its result is discarded.)
        valid_steps = jnp.clip(prediction.valid_steps, 1, jnp.maximum(count, 1))
        share = (valid_steps / jnp.maximum(count, 1)).astype(guess.dtype)
        request = SolveRequest(self.eps, monitor_contraction)
        if max_growth is not None:
            request = SolveRequest(self.eps, monitor_contraction, max_growth * share, valid_steps)
        found = optx.root_find(
            lambda y, segment: segment.residual(y),
            self.root_finder,
            guess,
            segment,
            {"request": request},
            max_steps=self.max_steps,
            throw=False,
        )
        report = SolveReport.of(found, capacity)
        jacobian = getattr(self.root_finder, "jacobian", None) if monitor_contraction and self.exact else None
        verification = Verification.of(
            segment, found.value, report.rounding_size, self.root_finder, self.eps, jacobian, report.stages
        )
        claimed = jnp.where(found.result == optx.RESULTS.successful, capacity, report.num_converged)
        claimed = jnp.minimum(claimed, report.horizon)
        num_solved = jnp.minimum(jnp.minimum(num_leading_true(verification.satisfied), claimed), count)

        # If no step was solved, measure growth over the valid part of the guess.
        growth_steps = jnp.where(num_solved > 0, num_solved, valid_steps)
        unknown = jnp.array(jnp.nan, guess.dtype)
        growth = unknown if verification.transitions is None else growth_over(verification.transitions, growth_steps)
        growth_exceeded = jnp.array(False)
        if max_growth is not None:
            # Unknown growth is NaN, which is not above the limit.
            growth_exceeded = (unknown if report.growth is None else report.growth) / share > max_growth
        iterations, rate = found.stats["num_steps"], growth / growth_steps.astype(growth.dtype)
        rates = dict(first_rate=rate, predicted=report.predicted_iterations)
        counts = self._counts(start, num_solved, iterations, prediction, verification, growth, **rates)
        evaluated = jnp.all(jnp.isfinite(verification.defect), axis=1)
        level = prediction.start_level
        return Attempt(found.value, num_solved, evaluated, found.result, level, growth_exceeded, counts)

    def solve_in_intervals(
        self,
        start: Int[ArrayLike, ""],
        state: Float[Array, " D"],
        count: Int[ArrayLike, ""],
        capacity: int,
        start_level: Int[ArrayLike, ""] = 0,
    ) -> Attempt | None:
        """As `solve_in_parallel`, by multiple shooting in kernels: a fixed number of iterations, without a look of the host
        at their progress. `None` if the device, the steps, the root finder or the predictor do not support it, or if there
        are too few steps.

        **Cost:** the guess; `ITERATIONS` iterations, each one kernel for all steps with their tangents, and one scan over
        the intervals; one more kernel for the states; one evaluation of all steps to verify the equations.
        """
        finder, length = self.root_finder, interval_length(capacity, self.init.size)
        plain = type(finder) is ParallelNewton and type(finder.jacobian) is Dense and self.max_steps >= ITERATIONS
        plain = plain and supports_intervals(self.scan, self.kernels)
        if length == 1 or not plain or not getattr(self.predict, "supports_intervals", False):
            return None
        segment, count = self.recurrence.segment(start, count, state, capacity), jnp.asarray(count)
        shooting = Shooting.of(segment, count, length, self.kernels)
        if shooting is None:
            return None
        prediction = self.predict.in_intervals(shooting.recurrence, start, count, length, start_level)  # pyright: ignore
        guess = stop_gradient(_finite_guess(prediction, state))
        tolerance = Tolerance(finder.rtol, finder.atol, finder.norm, self.eps)
        found = shooting.solve(guess, tolerance, self.scan)
        y = shooting.all_states(found.y)
        converged = jnp.minimum(found.num_converged * length, count)
        verification = Verification.of(segment, y, shooting.repeat(found.size), finder, self.eps)
        num_solved = jnp.minimum(num_leading_true(verification.satisfied), converged)
        # If no step was solved, growth is measured over all.
        measured = jnp.maximum(-(-jnp.where(num_solved > 0, num_solved, count) // length), 1)
        growth = growth_over(found.transitions, measured)
        iterations, rate = jnp.array(ITERATIONS), growth / (length * measured).astype(growth.dtype)
        counts = self._counts(start, num_solved, iterations, prediction, verification, growth, first_rate=rate)
        evaluated = jnp.all(jnp.isfinite(verification.defect), axis=1)
        result = optx.RESULTS.where(num_solved >= count, optx.RESULTS.successful, optx.RESULTS.nonlinear_divergence)
        level, finer = prediction.start_level, prediction.finer_level
        too_coarse = jnp.array(False) if finer is None else (num_solved <= count // 4) & (finer != level)
        level = level if finer is None else jnp.where(too_coarse, finer, level)
        return Attempt(y, num_solved, evaluated, result, level, jnp.array(False), counts, too_coarse)

    def _counts(
        self, start, num_solved, iterations, prediction, verification, growth, *, first_rate, predicted=None
    ) -> Counts:
        """The work of an attempt from step `start`, of which `num_solved` steps are solved. `predicted` is the number of
        iterations that was predicted, if any was."""
        capacity = verification.defect.shape[0]
        solved = (jnp.arange(capacity) < num_solved)[:, None]
        growth = jnp.where((num_solved > 0) | jnp.isnan(growth), growth, 0)
        return Counts(
            attempts=jnp.array(1),
            iterations=iterations,
            predicted_iterations=iterations if predicted is None else predicted,
            parallel_steps=num_solved,
            predictor_steps=prediction.steps,
            residual=jnp.max(jnp.where(solved, verification.relative_defect, 0)),
            growth=growth,
            first_rate=first_rate,
            in_kernel=jnp.array(False),
            segments=Segments.one(jnp.asarray(start), num_solved, iterations, growth),
        )

    def buffer(self, y: Float[Array, " N D"] | None = None, capacity: int = 0) -> Float[Array, " M D"]:
        """A buffer for all states that begins with `y`, if given. It has room to write `capacity` states, or one chunk of
        sequential steps, from any step on."""
        length = -(-(self.length + max(capacity, self._chunk)) // _MULTIPLE) * _MULTIPLE
        if y is None:
            return self.scan.place(jnp.broadcast_to(self.init, (length, *self.init.shape)))
        # A concatenation would gather an array that is spread over devices.
        y = jnp.pad(y, [(0, length - self.length), (0, 0)])
        return self.scan.place(jnp.where((jnp.arange(length) < self.length)[:, None], y, self.init[None]))

    def state_before(self, y: Float[Array, " M D"], step: Int[Array, ""]) -> Float[Array, " D"]:
        """The state before a step, from a buffer of states."""
        return jnp.where(step == 0, self.init, row_at(y, jnp.maximum(step - 1, 0)))

    def step_sequentially(
        self, y: Float[Array, " M D"], start: Int[ArrayLike, ""], stop: Int[ArrayLike, ""], meter_state: PyTree = None
    ) -> tuple[Float[Array, " M D"], Int[Array, ""], PyTree]:
        """Makes the steps from `start` to before `stop`, and perhaps more, one after the other.

        **Arguments:** a `buffer` of states that is correct before `start`; `start` and `stop`; the state of the meter.

        **Returns:** the buffer; the first step that was not made, which is `start` if there was nothing to do; the state of
        the meter.
        """
        end, stepper = self.end, self.stepper()
        stop = jnp.minimum(stop, end)

        def body(carry):
            begin, y, meter_state = carry
            # Beyond the end the last step repeats. Its results go to the room behind the states.
            inputs = self.recurrence.inputs_from(begin, stepper.chunk)
            states, made, _ = stepper(self.state_before(y, begin), inputs, stop - begin, check=True)
            meter_state = self.update_meter(meter_state, jnp.minimum(begin + made, end))
            return begin + made, self.scan.write(y, states, begin), meter_state

        first = (jnp.asarray(start), y, meter_state)
        begin, y, meter_state = lax.while_loop(lambda carry: carry[0] < stop, body, first)
        return y, jnp.minimum(begin, end), meter_state

    def make_all_steps(self, stepper: Stepper) -> tuple[Float[Array, " N D"], Bool[Array, ""] | None]:
        """Makes all steps sequentially, by a `stepper` of this driver. Returns the states, and whether all are finite, if
        that is known without a look at each of them."""
        num_steps, meter_state = self.length, self.start_meter()
        finite = None
        if stepper.chunk == num_steps:
            y, _, finite = stepper(self.init, self.recurrence.inputs, self.end, check=True)
            y, meter_state = self.scan.place(y), self.update_meter(meter_state, num_steps)
        else:
            y, _, meter_state = self.step_sequentially(self.buffer(), 0, self.end, meter_state)
        self.close_meter(meter_state)
        return self.all_states(y), finite if self.count is None else None

    def all_states(self, y: Float[Array, " M D"]) -> Float[Array, " N D"]:
        """The states after all steps, from a buffer of those that are made. The others leave the state unchanged: their
        inputs may be such that a step has no value."""
        if self.count is not None:
            made = jnp.arange(y.shape[0]) < self.end
            y = jnp.where(made[:, None], y, self.state_before(y, jnp.asarray(self.end))[None])
        return y[: self.length]

    def stepper(self) -> Stepper:
        """Makes the steps sequentially. On a GPU it takes time to build, for each kernel is lowered once in advance."""
        step, first_input = self.recurrence.step, self.recurrence.first_input
        stepper = Stepper(step, self.init, first_input, self._chunk, kernels=self.kernels)
        self._notes.has_kernel |= stepper.kernel is not None
        return stepper

    def steps_in_kernel(self, like: Array) -> Bool[Array, ""]:
        """Whether a kernel made the sequential steps, if there were any. `like` is an array with every batch axis."""
        return kernels_make(like) if self._notes.has_kernel else jnp.array(False)
