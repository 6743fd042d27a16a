"""The two ways to make steps of a recurrence: many at once, or one after the other."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._scan import AbstractScan, AbstractTransitions, AutoScan, DenseTransitions, row_at
from ._contraction_monitor import growth_over
from ._recurrence import Recurrence
from ._stepper import largest_chunk, Stepper
from ._tolerance import effective_scale, num_leading_true, Tolerance


# Buffers of states have a multiple of so many rows.
_MULTIPLE = 64


class Counts(eqx.Module):
    """The work of one or several attempts.

    **Attributes:**

    - `attempts`: segments of steps that a root finder was put on.
    - `iterations`: of the root finder.
    - `predicted_iterations`: how many were expected after the first of each attempt.
    - `parallel_steps`: steps that the root finder solved.
    - `predictor_steps`: steps made in sequence for first guesses.
    - `residual`: the largest defect `|F(y[i-1]) - y[i]|` of the solved steps, relative to the size that the component
        has had so far.
    - `growth`: the logarithm of how much the solved steps amplify a random perturbation, summed over attempts; NaN where the
        Jacobians are not exact, or nobody watched.
    - `first_rate`: the growth per step in the first attempt.
    """

    attempts: Int[Array, ""]
    iterations: Int[Array, ""]
    predicted_iterations: Int[Array, ""]
    parallel_steps: Int[Array, ""]
    predictor_steps: Int[Array, ""]
    residual: Float[Array, ""]
    growth: Float[Array, ""]
    first_rate: Float[Array, ""]

    @classmethod
    def none(cls, dtype) -> "Counts":
        """Before the first attempt."""
        zero = jnp.array(0)
        return cls(zero, zero, zero, zero, zero, jnp.array(0, dtype), jnp.array(0, dtype), jnp.array(jnp.nan, dtype))

    def add(self, other: "Counts") -> "Counts":
        """With the work of one more attempt."""
        return Counts(
            self.attempts + other.attempts,
            self.iterations + other.iterations,
            self.predicted_iterations + other.predicted_iterations,
            self.parallel_steps + other.parallel_steps,
            self.predictor_steps + other.predictor_steps,
            jnp.maximum(self.residual, other.residual),
            self.growth + other.growth,
            jnp.where(self.attempts == 0, other.first_rate, self.first_rate),
        )

    def growth_over(self, num_steps: int) -> Float[Array, ""]:
        """The growth over so many steps, at the mean rate of those that were solved; of the first attempt, if none was."""
        rate = self.growth / jnp.maximum(self.parallel_steps, 1)
        return num_steps * jnp.where(self.parallel_steps > 0, rate, self.first_rate)


class Attempt(eqx.Module):
    """What became of a segment of steps that were solved together.

    **Attributes:**

    - `y`: the states, shape `(capacity, D)`.
    - `solved`: the number of leading steps whose equations hold to tolerance.
    - `evaluated`: the steps whose defect is finite, shape `(capacity,)`.
    - `result`: the root finder's.
    - `start_level`: what to hand to the next attempt of the same capacity.
    - `forbidden`: whether perturbations grow by more than was allowed.
    - `counts`: the work.
    """

    y: Float[Array, " C D"]
    solved: Int[Array, ""]
    evaluated: Bool[Array, " C"]
    result: optx.RESULTS
    start_level: Int[Array, ""]
    growth_exceeded: Bool[Array, ""]
    counts: Counts


def scan_of(root_finder: optx.AbstractRootFinder) -> AbstractScan:
    """The scan of a root finder: of one that is not of this package, the default."""
    return getattr(root_finder, "scan", AutoScan())


def _residual(y, recurrence):
    return recurrence.residual(y)


class _Verification(eqx.Module):
    """What a root finder found, put into the equations once more.

    **Attributes:** the defects; whether the equations of all steps up to each hold; the defects relative to the size of the
    states; the Jacobians, if they were asked for.
    """

    defect: Float[Array, " C D"]
    satisfied: Bool[Array, " C"]
    relative: Float[Array, " C D"]
    transitions: AbstractTransitions | None


def _verify(
    recurrence: Recurrence, found: optx.Solution, root_finder, eps: float, with_jacobians: bool
) -> _Verification:
    y, transitions, inner = found.value, None, True
    tolerance = Tolerance(root_finder.rtol, root_finder.atol, root_finder.norm, eps)
    scale = tolerance.scale(y)
    size = found.stats.get("rounding_size", scale)
    scale = effective_scale(scale, size)
    if "stages" in found.stats:
        defect, step = recurrence.linearised(y, found.stats["stages"])
        # The defects are those after one more iteration on the inner unknowns, whose error is the square of the last
        # change.
        resolved = [tolerance.resolved(step.shift[:, i], scale, size) for i in range(step.shift.shape[1])]
        inner = jnp.all(jnp.stack(resolved), axis=0)
        transitions = DenseTransitions(step.matrix) if with_jacobians else None
    elif with_jacobians:
        defect, transitions, _ = root_finder.jacobian.linearise(lambda y: (recurrence.residual(y), None), y)
    else:
        defect = recurrence.residual(y)
    relative = jnp.where(defect == 0, 0, jnp.abs(defect) / jnp.where(scale > 0, scale, 1))
    return _Verification(defect, tolerance.satisfied(defect, scale, size) & inner, relative, transitions)


class RecurrenceDriver(eqx.Module):
    """Makes steps of a recurrence.

    **Arguments:**

    - `recurrence`: the steps.
    - `predict`: from `(segment, start, count, start_level)`, a `Recurrence.segment` of `count` steps from `start`, to a guess of
        its states, the number of steps made in sequence for that, up to which step it is a guess, and the start level for the
        next call: at first it is zero.
    - `root_finder`: any Optimistix root finder that can solve the stacked residual.
    - `max_steps`: the largest number of iterations of an attempt.
    - `eps`: the machine epsilon of the states' own dtype.
    - `step_size`: how long a step is, in units of time.
    - `meter`: shows which share of the steps is made: an object with Diffrax's `init()`, `step(state, progress)` and
        `close(state)`. `None` shows nothing.
    """

    recurrence: Recurrence
    predict: Callable
    root_finder: optx.AbstractRootFinder
    max_steps: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    step_size: Float[ArrayLike, ""] = 1.0
    meter: Any = None

    @property
    def scan(self) -> AbstractScan:
        """Along which time lies."""
        return scan_of(self.root_finder)

    @property
    def length(self) -> int:
        """`N`."""
        return self.recurrence.length

    @property
    def init(self) -> Float[Array, " D"]:
        """The state before the first step."""
        return self.recurrence.init

    def start_meter(self) -> PyTree:
        """The state of the meter before the first step."""
        return None if self.meter is None else self.meter.init()

    def show(self, meter: PyTree, position: Int[ArrayLike, ""]) -> PyTree:
        """Shows that so many steps are made."""
        if self.meter is None:
            return None
        progress = jnp.asarray(position, jnp.result_type(float)) / self.length
        return self.meter.step(meter, progress)

    def stop_meter(self, meter: PyTree):
        """After the last step."""
        if self.meter is not None:
            self.meter.close(meter)

    def solve_in_parallel(
        self,
        start: Int[ArrayLike, ""],
        state: Float[Array, " D"],
        count: Int[ArrayLike, ""],
        capacity: int,
        start_level: Int[ArrayLike, ""] = 0,
        watch: bool = False,
        max_growth: Float[Array, ""] | None = None,
    ) -> Attempt:
        """Solves `count` steps from `start` together, or as many of them as converge.

        **Arguments:**

        - `start`, `state`, `count`: the steps, and the state before the first of them.
        - `capacity`: the number of steps that arrays are made for, at least `count`.
        - `start_level`: of an earlier attempt of the same capacity, or zero.
        - `watch`: whether the attempt is confined to the leading steps on which the iteration contracts, and the growth of
            perturbations measured.
        - `max_growth`: if given, the attempt is given up at once if the logarithm of the growth over all steps is larger.

        Cost: the guess; the iterations; one evaluation of all steps, in which what the root finder believes is checked
        against the equations themselves.
        """
        segment = self.recurrence.segment(start, count, state, capacity)
        segment = segment.on(self.scan.place(segment.inputs))
        prediction = self.predict(segment, start, count, start_level)
        finite = jnp.all(jnp.isfinite(prediction.y), axis=1, keepdims=True)
        guess = self.scan.place(jnp.where(finite, prediction.y, state))
        # The growth over all steps is that over those where the guess means something, continued.
        # (In a batch, a member that is done asks for no steps, and discards what it gets.)
        reach = jnp.clip(prediction.reach, 1, jnp.maximum(count, 1))
        share = (reach / jnp.maximum(count, 1)).astype(guess.dtype)
        options = {"resolution": self.eps, "watch": watch}
        if max_growth is not None:
            options |= {"max_growth": max_growth * share, "reach": reach}
        found = optx.root_find(
            _residual, self.root_finder, guess, args=segment, options=options, max_steps=self.max_steps, throw=False
        )
        watched = watch and getattr(self.root_finder, "exact", False)
        verification = _verify(segment, found, self.root_finder, self.eps, watched)
        claimed = jnp.where(found.result == optx.RESULTS.successful, capacity, found.stats.get("num_converged", 0))
        claimed = jnp.minimum(claimed, found.stats.get("horizon", capacity))
        solved = jnp.minimum(jnp.minimum(num_leading_true(verification.satisfied), claimed), count)

        # Of nothing that was solved, as far as the guess means something.
        over = jnp.where(solved > 0, solved, reach)
        unknown = jnp.array(jnp.nan, guess.dtype)
        growth = unknown if verification.transitions is None else growth_over(verification.transitions, over)
        growth_exceeded = jnp.array(False)
        if max_growth is not None:
            # NaN is not above the limit: nothing is known then.
            growth_exceeded = found.stats.get("growth", unknown) / share > max_growth
        counts = Counts(
            attempts=jnp.array(1),
            iterations=found.stats["num_steps"],
            predicted_iterations=found.stats.get("predicted_iterations", jnp.array(0)),
            parallel_steps=solved,
            predictor_steps=prediction.steps,
            residual=jnp.max(jnp.where((jnp.arange(capacity) < solved)[:, None], verification.relative, 0)),
            growth=jnp.where((solved > 0) | jnp.isnan(growth), growth, 0),
            first_rate=growth / over,
        )
        evaluated = jnp.all(jnp.isfinite(verification.defect), axis=1)
        return Attempt(found.value, solved, evaluated, found.result, prediction.start_level, growth_exceeded, counts)

    def buffer(self, y: Float[Array, " N D"] | None = None, capacity: int = 0) -> Float[Array, " M D"]:
        """Room for all states and beyond, so that whatever is written from any step on fits: begins with `y`."""
        # A whole number of times that of devices, if that is a power of two.
        room = -(-(self.length + max(capacity, largest_chunk())) // _MULTIPLE) * _MULTIPLE
        if y is None:
            return self.scan.place(jnp.broadcast_to(self.init, (room, *self.init.shape)))
        # Not as a concatenation, which would gather what is spread over devices.
        y = jnp.pad(y, [(0, room - self.length), (0, 0)])
        return self.scan.place(jnp.where((jnp.arange(room) < self.length)[:, None], y, self.init))

    def state_before(self, y: Float[Array, " M D"], step: Int[Array, ""]) -> Float[Array, " D"]:
        """The state that a step starts from."""
        return jnp.where(step == 0, self.init, row_at(y, jnp.maximum(step - 1, 0)))

    def in_sequence(
        self, y: Float[Array, " M D"], start: Int[ArrayLike, ""], stop: Int[ArrayLike, ""], meter: PyTree = None
    ) -> tuple[Float[Array, " M D"], Int[Array, ""], PyTree]:
        """Makes the steps from `start` on, until at least `stop`, one after the other.

        **Arguments:** a `buffer` of states, right before `start`; the first step, and the first that need not be made; the
        state of the meter.

        **Returns:** the buffer, right before a step that is also returned: `start` if there was nothing to do; the meter.
        """
        num_steps = self.length
        stop = jnp.minimum(stop, num_steps)
        stepper = Stepper(self.recurrence.step, self.init, self.recurrence.first_input, largest_chunk())

        def body(carry):
            begin, y, meter = carry
            # Past the end the last step is repeated, into the room beyond the states.
            inputs = self.recurrence.inputs_of(begin, stepper.chunk)
            states, made = stepper(self.state_before(y, begin), inputs, stop - begin)
            meter = self.show(meter, jnp.minimum(begin + made, num_steps))
            return begin + made, self.scan.write(y, states, begin), meter

        start = jnp.asarray(start)
        begin, y, meter = lax.while_loop(lambda carry: carry[0] < stop, body, (start, y, meter))
        return y, jnp.minimum(begin, num_steps), meter
