"""Steps of the lengths that a step-size controller chooses, one after the other: a whole adaptive solve as one loop."""

from dataclasses import replace
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._kernels import any_member, indexed_loop, on_cpu
from .._recurrence import AbstractInputs, Ravel, segment_length, stop_gradient, without_tangents
from .._scan import preceded_by
from ._events import EndConditions
from ._statistics import Pace
from ._step_map import AbstractTrial, StepWithStages
from ._window import before


# With outputs, the states of this many steps are stored at a time.
_SEGMENT = 256


class WindowStart(eqx.Module):
    """A window from `t0` to `t1`, and what an adaptive solve of it starts from: the state `y0` of the recurrence, the
    `pace`, and whether the field has just jumped."""

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    y0: PyTree
    args: PyTree
    pace: Pace
    made_jump: Bool[ArrayLike, ""]


class Outcome(eqx.Module):
    """How an adaptive solve ended: after `count` accepted steps of `tried` ones, at the time `end` in the raveled state `y`.
    `result` is that of the steps and the controller. `reached` tells whether `end` is the end of the window, `pace` how to
    go on. `latest` is the last step; `None` if nothing needs it. `in_kernel` tells whether a kernel made the steps.
    `events` are the values of the conditions before and after the last step; `None` if there are none."""

    end: Float[Array, ""]
    y: Float[Array, " D"]
    count: Int[Array, ""]
    tried: Int[Array, ""]
    reached: Bool[Array, ""]
    result: dfx.RESULTS
    pace: Pace
    latest: "LatestStep | None"
    in_kernel: Bool[Array, ""]
    events: tuple | None


class LatestStep(eqx.Module):
    """An accepted step, from `begin` and the raveled state `before` to `end`."""

    begin: Float[Array, ""]
    end: Float[Array, ""]
    before: Float[Array, " D"]


class StepTimes(AbstractInputs):
    """When the accepted steps begin and end, `count` of them in arrays for at least `capacity`. Entries after the last step
    are steps of length zero at its `end`. Without `begins`, the first step begins at `t0`, and each other one where the one
    before ends."""

    t0: Float[Array, ""]
    begins: Float[Array, " N"] | None
    ends: Float[Array, " N"]
    end: Float[Array, ""]
    count: Int[Array, ""]
    limit: int = eqx.field(static=True)

    @property
    def capacity(self):
        return self.limit

    def rows(self, first, length):
        last, number = self.ends.shape[0] - 1, first + jnp.arange(length, dtype=first.dtype)
        # (All members of a batch read the same rows, without gathers.)
        read = lambda times: jnp.where(number < self.count, times[jnp.minimum(number, last)], self.end)
        ends = read(self.ends)
        if self.begins is not None:
            return read(self.begins), ends
        begin = jnp.where(first > 0, self.ends[jnp.clip(first - 1, 0, last)], self.t0)
        return preceded_by(jnp.where(first > self.count, self.end, begin), ends), ends


class KeptSteps(eqx.Module):
    """Some of the accepted steps: their indices, the times when they begin and end, the raveled states there, and whether
    each was made. `before` is only what a step depends on: see `ControlledSteps.depended_on`. Of one step, without the axis
    `M`."""

    index: Int[Array, " *M"]
    begins: Float[Array, " *M"]
    ends: Float[Array, " *M"]
    before: Float[Array, " *M B"]
    after: Float[Array, " *M D"]
    made: Bool[Array, " *M"]


class _Progress(eqx.Module):
    """The state of the loop: the next step, from `begin` and `y` to `end`, and `length`, which it would have if the window
    did not end."""

    begin: Float[Array, ""]
    end: Float[Array, ""]
    length: Float[Array, ""]
    y: Float[Array, " D"]
    cache: PyTree
    controller_state: PyTree
    # `None` if there are no jumps.
    made_jump: Bool[ArrayLike, ""] | None
    count: Int[Array, ""]
    tried: Int[Array, ""]
    result: dfx.RESULTS
    # `None` if nothing needs it.
    latest: LatestStep | None
    # The values of the conditions before and after the last step, and whether one of them ends the solve. `None` if there
    # are none.
    events: tuple | None
    stopped: Bool[Array, ""] | None


class ControlledSteps(eqx.Module):
    """The steps of a window as `diffrax.diffeqsolve` makes them: the `controller` accepts or rejects each, and chooses the
    next. After `limit` steps, accepted or rejected, or when a condition is met, they end. No part may have tangents.

    On a GPU they are one kernel, with one thread per member of a batch, if the kernel compiler knows the operations of the
    step and the controller.
    """

    trial: AbstractTrial
    controller: dfx.AbstractStepSizeController
    window: WindowStart
    conditions: EndConditions | None
    error_order: Any
    ravel: Ravel = eqx.field(static=True)
    limit: int = eqx.field(static=True)
    kernels: str = eqx.field(static=True)

    @property
    def smooth(self) -> bool:
        """Whether each step begins where the one before ends. A `PIDController` by itself makes no jumps."""
        return self.window.made_jump is False and type(self.controller) is dfx.PIDController

    def start(self, keeps_latest: bool) -> _Progress:
        """Before the first step."""
        t0, t1, pace, y0 = self.window.t0, self.window.t1, self.window.pace, self.ravel.ravel(self.window.y0)
        end = t0 + pace.length
        end = jnp.where(end > before(t1), t1, end)
        zero = jnp.zeros((), jnp.int32)
        values = None if self.conditions is None else self.conditions.values(t0, self.state_of(y0))
        start = _Progress(
            begin=t0,
            end=end,
            length=pace.length,
            y=y0,
            cache=self.trial.cache(t0, end, self.window.y0),
            controller_state=pace.state,
            made_jump=None if self.smooth else jnp.asarray(self.window.made_jump),
            count=zero,
            tried=zero,
            result=dfx.RESULTS.successful,
            latest=LatestStep(t0, t0, y0) if keeps_latest or not on_cpu(self.kernels) else None,
            events=None if values is None else (values, values),
            stopped=None if values is None else jnp.array(False),
        )
        return jtu.tree_map(_strong, stop_gradient(start))

    def depended_on(self, y: Float[Array, "*M D"]) -> Float[Array, "*M B"]:
        """The entries, the first ones, of the state before a step on which the step depends."""
        y0 = self.window.y0
        return y[..., : Ravel(y0[0]).size] if isinstance(self.trial.step_map, StepWithStages) else y

    def state_of(self, y: Float[Array, " D"]) -> PyTree:
        """The state of the equation in a raveled state."""
        return self.trial.step_map.end(self.ravel.unravel(y))[0]

    def unfinished(self, state: _Progress) -> Bool[Array, ""]:
        """Whether another step is to be made."""
        more = (state.begin < self.window.t1) & dfx.is_successful(state.result) & (state.tried < self.limit)
        return more if state.stopped is None else more & ~state.stopped

    def try_step(self, old: _Progress, last_end: Float[Array, ""]) -> tuple[_Progress, Float[Array, " D"]]:
        """Tries the next step. Also returns the state after it. One that would end after `last_end` ends with the window."""
        t1, jumps = self.window.t1, old.made_jump if old.made_jump is not None else False
        y1, y_error, cache, result = self.trial.step(old.begin, old.end, self.ravel.unravel(old.y), old.cache, jumps)
        y1 = self.ravel.ravel(y1)
        # To a controller, a step that is not finite has an infinite error, relative to its initial state. (A step that is
        # infinite would have an error of NaN, with which no `PIDController` goes on.)
        finite = jnp.all(jnp.isfinite(y1))
        y_error = jtu.tree_map(lambda x: jnp.where(finite & ~jnp.isnan(x), x, jnp.inf), y_error)
        states = self.state_of(old.y), self.state_of(jnp.where(finite, y1, old.y))
        step = old.begin, old.end, *states, self.window.args, y_error, self.error_order, old.controller_state
        accepted, begin, end, jumped, controller_state, failure = self.controller.adapt_step_size(*step)
        length, begin = end - begin, jnp.minimum(begin, t1)
        # A step that the window cut short says little about the next one.
        cut = accepted & (old.end >= t1) & (old.length > length)
        length = jnp.where(cut, old.length, length)
        if isinstance(self.controller, dfx.PIDController):
            # Its state would tell that the next step is of the smallest length, and that it must be accepted.
            controller_state = jtu.tree_map(
                lambda new, kept: jnp.where(cut, kept, new), controller_state, old.controller_state
            )
        end = jnp.where(end > last_end, jnp.where(accepted, t1, begin + 0.5 * (t1 - begin)), end)
        result = dfx.RESULTS.where(accepted, result, dfx.RESULTS.successful)
        kept = lambda new, old: jtu.tree_map(lambda new, old: jnp.where(accepted, new, old), new, old)
        y = kept(y1, old.y)
        events: tuple | None = None
        stopped: Any = None
        if self.conditions is not None:
            assert old.events is not None
            values = self.conditions.values(begin, self.state_of(y))
            events = (kept(old.events[1], old.events[0]), kept(values, old.events[1]))
            stopped = accepted & self.conditions.ends(*events)
        new = _Progress(
            begin=begin,
            end=end,
            length=length,
            y=y,
            cache=kept(cache, old.cache),
            controller_state=controller_state,
            made_jump=None if self.smooth else kept(jumped, old.made_jump),
            count=jnp.where(accepted, old.count + 1, old.count),
            tried=old.tried + 1,
            result=dfx.RESULTS.where(dfx.is_successful(result), failure, result),
            latest=None if old.latest is None else kept(LatestStep(old.begin, old.end, old.y), old.latest),
            events=events,
            stopped=stopped,
        )
        return jtu.tree_map(lambda new, old: jnp.asarray(new, old.dtype), new, old), y1

    def advance(
        self, start: _Progress, num_stored: int, stores_times: bool, stores_states: bool
    ) -> tuple[_Progress, StepTimes | None, Float[Array, " K D"] | None, Bool[Array, ""]]:
        """Makes steps until the last one, or, if any are stored, until `num_stored` were accepted. Also returns the times of
        the accepted steps and the states after them, if they are to be stored, and whether a kernel made them."""
        # (Outside the loop: kernels know no operations on bits.)
        last_end = before(self.window.t1)
        one_step = without_tangents(lambda old: self.try_step(old, last_end), start)
        stores, first = stores_times or stores_states, start.count

        def next_index(state):
            more = self.unfinished(state)
            return jnp.where(more & (state.count - first < num_stored) if stores else more, 0, -1)

        def body(old, _):
            new, y1 = one_step(old)
            times = (None if self.smooth else old.begin, old.end) if stores else None
            return new, (times, y1 if stores_states else None), old.count - first, next_index(new)

        last, (times, y), in_kernel = indexed_loop(
            body, start, next_index(start), (), num_stored if stores else 0, self.kernels
        )
        if times is not None:
            begins, ends = times
            times = StepTimes(start.begin, begins, ends, last.begin, last.count - first, num_stored)
        return last, times, y, in_kernel

    def outcome(self, last: _Progress, in_kernel: Bool[Array, ""]) -> Outcome:
        """The outcome after the last step."""
        count, tried = (x.astype(jnp.result_type(int)) for x in (last.count, last.tried))
        pace, reached = Pace(last.length, last.controller_state), last.begin >= self.window.t1
        return Outcome(
            last.begin, last.y, count, tried, reached, last.result, pace, last.latest, in_kernel, last.events
        )

    def stopped(self, outcome: Outcome) -> Bool[Array, ""]:
        """Whether a condition ended the solve."""
        if self.conditions is None or outcome.events is None:
            return jnp.array(False)
        return self.conditions.ends(*outcome.events)


def make_steps(steps: ControlledSteps, stores_times: bool) -> tuple[Outcome, StepTimes | None]:
    """Makes the steps, and stores their times if they are wanted."""
    last, times, _, in_kernel = steps.advance(steps.start(False), steps.limit, stores_times, False)
    return steps.outcome(last, in_kernel), times


def make_and_store_steps(steps: ControlledSteps) -> tuple[Outcome, KeptSteps]:
    """Makes the steps, and stores all in arrays for as many as there may be. Entries after the last step are those of
    `StepTimes`."""
    start = steps.start(True)
    last, times, y, in_kernel = steps.advance(start, steps.limit, True, True)
    assert times is not None and y is not None
    number = jnp.arange(steps.limit, dtype=jnp.int32)
    made = number < last.count
    begins, ends = times.rows(jnp.zeros((), jnp.int32), steps.limit)
    y = jnp.where(made[:, None], y, last.y[None])
    kept = KeptSteps(number, begins, ends, preceded_by(start.y, y), y, made)
    return steps.outcome(last, in_kernel), kept


def make_steps_with_outputs(
    steps: ControlledSteps, requested: Float[Array, " M"], stores_times: bool
) -> tuple[Outcome, StepTimes | None, KeptSteps]:
    """Makes the steps, and keeps those that contain the `requested` times, which increase. Stores the times of all if they
    are wanted.

    The states of 256 steps are stored at a time, on a CPU of fewer if they are large. A requested time that no step contains
    is given the last step.
    """
    start = steps.start(requested.shape[0] > 0 or steps.conditions is not None)
    length = min(steps.limit, segment_length(_SEGMENT, steps.ravel.size, steps.kernels))
    none = lambda x: jnp.zeros((requested.shape[0], *x.shape), x.dtype)
    zero, count = jnp.zeros((), jnp.int32), requested.shape[0]
    states = steps.depended_on(start.y), start.y
    kept = jtu.tree_map(none, KeptSteps(zero, start.begin, start.begin, *states, jnp.array(False)))
    times = None
    if stores_times:
        room = jnp.zeros(steps.limit + length, start.begin.dtype)
        times = StepTimes(start.begin, None if steps.smooth else room, room, start.begin, zero, steps.limit)

    def segment(state):
        old, first, kept, times, in_kernel = state
        new, own, y, made_here = steps.advance(old, length, True, count > 0)
        assert own is not None
        if y is not None:
            in_segment = jnp.arange(length, dtype=jnp.int32) < new.count - old.count
            ends = jnp.where(in_segment, own.ends, jnp.inf)
            place = jnp.minimum(jnp.searchsorted(ends, requested, side="left", method="scan_unrolled"), length - 1)
            found = in_segment[place] & (ends[place] >= requested)
            begins, ends = own.rows(zero, length)
            index = old.count + place.astype(jnp.int32)
            states = preceded_by(*map(steps.depended_on, (old.y, y)))[place], y[place]
            here = KeptSteps(index, begins[place], ends[place], *states, jnp.ones(count, bool))
            kept = _where(~kept.made & found, here, kept)
        if times is not None:
            # (All members of a batch that are not done have made as many steps.)
            put = lambda x, new: lax.dynamic_update_slice_in_dim(x, new, first, 0)
            arrays = lambda times: [x for x in (times.begins, times.ends) if x is not None]
            times = eqx.tree_at(arrays, times, list(map(put, arrays(times), arrays(own))))
            times = replace(times, end=new.begin, count=new.count)
        return new, first + length, kept, times, jnp.where(steps.unfinished(old), made_here, in_kernel)

    state = start, zero, kept, times, jnp.array(False)
    last, _, kept, times, in_kernel = lax.while_loop(
        lambda state: any_member(steps.unfinished(state[0])), segment, state
    )
    outcome = steps.outcome(last, in_kernel)
    # An event may be located in the last step, at a time before a later requested one.
    rest = last_step(steps, outcome, count)
    rest = eqx.tree_at(lambda rest: rest.made, rest, rest.made & (False if last.stopped is None else last.stopped))
    return outcome, times, _where(kept.made, kept, rest)


def last_step(steps: ControlledSteps, outcome: Outcome, count: int = 1) -> KeptSteps:
    """The last step, `count` times. None was made if that is unknown."""
    latest = LatestStep(outcome.end, outcome.end, outcome.y) if outcome.latest is None else outcome.latest
    known = (outcome.count > 0) & (outcome.latest is not None)
    index = jnp.maximum(outcome.count - 1, 0).astype(jnp.int32)
    step = KeptSteps(index, latest.begin, latest.end, steps.depended_on(latest.before), outcome.y, known)
    return jtu.tree_map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), step)


def _where(chosen: Bool[Array, " M"], new: KeptSteps, old: KeptSteps) -> KeptSteps:
    return jtu.tree_map(lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _strong(x):
    """Without the weak type of a Python number: the types of a loop may not change."""
    x = jnp.asarray(x)
    return lax.convert_element_type(x, x.dtype)
