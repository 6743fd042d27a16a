"""A window whose steps an adaptive step-size controller chooses, one after the other."""

from dataclasses import fields, replace
from typing import Any, cast, TypeGuard

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._kernels import has_forward_mode, on_cpu
from .._recurrence import (
    keep_in_checkpoint,
    KeptStates,
    MadeSteps,
    nan_derivative_unless,
    Ravel,
    Recurrence,
    stop_gradient,
    with_replayed_derivative,
    with_reverse_derivative,
    with_sequential_derivative,
    without_tangents,
)
from ._compat import Solve
from ._controlled_steps import (
    ControlledSteps,
    KeptSteps,
    last_step,
    LatestStep,
    make_and_store_steps,
    make_steps,
    make_steps_with_outputs,
    Outcome,
    WindowStart,
)
from ._events import EndConditions
from ._interpolation import FineSteps, may_end_elsewhere, RepeatedSteps
from ._statistics import Pace
from ._step_map import AbstractStepMap, ExplicitRungeKuttaStep, make_trial, StepWithStages


# Up to this size of a state, the stages of costly steps are kept. In forward mode their tangents are stored for
# `max_steps` steps.
_LARGEST_WITH_STAGES = 128


class SingleWindow(dfx.AbstractStepSizeController):
    """Makes the whole solve one window, in which the steps are those of an adaptive `controller`, from a first step `dt0` as
    in Diffrax. If they are more than the window has room for, the result is `max_steps_reached`."""

    controller: dfx.AbstractStepSizeController
    dt0: Float[ArrayLike, ""] | None

    def wrap(self, direction):
        dt0 = None if self.dt0 is None else self.dt0 * direction
        return SingleWindow(self.controller.wrap(direction), dt0)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        del terms, t0, y0, dt0, args, func, error_order
        return t1, None

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state):
        del t0, y0, y1_candidate, args, y_error, error_order
        return True, t1, t1, False, controller_state, dfx.RESULTS.successful


def adaptive_part(controller: dfx.AbstractStepSizeController | None) -> dfx.AbstractStepSizeController | None:
    """The adaptive controller of the steps, if the controller of the windows has one. (What clips steps clips windows.)"""
    if isinstance(controller, SingleWindow):
        return controller.controller
    while controller is not None and not _is_adaptive(controller):
        inner = [getattr(controller, field.name) for field in fields(controller)]
        controller = next((x for x in inner if isinstance(x, dfx.AbstractStepSizeController)), None)
    return controller


def _is_adaptive(controller) -> bool:
    adaptive = isinstance(controller, dfx.AbstractAdaptiveStepSizeController)
    return adaptive and not isinstance(controller, dfx.ClipStepSizeController)


def initial_pace(controller, terms, t0, t1, y0, args, func, error_order) -> Pace:
    """The first step, and the state of the adaptive controller before it. `controller` lays the windows, the first of which
    goes from `t0` to `t1`."""
    time, dt0 = jnp.result_type(t0), controller.dt0 if isinstance(controller, SingleWindow) else t1 - t0
    dt0 = None if dt0 is None else jnp.asarray(dt0, time)
    adaptive: Any = adaptive_part(controller)
    end, state = adaptive.init(terms, t0, t1, y0, dt0, args, func, error_order)
    as_array = lambda x: jnp.asarray(x, jnp.result_type(x)) if eqx.is_array_like(x) else x
    return Pace(jnp.asarray(end - t0, time), jtu.tree_map(as_array, state))


class ControlledWindow(eqx.Module):
    """The outputs of a window: the state of the recurrence at its end; the raveled ones after each step, if all are stored;
    the steps as dense output needs them, the error estimate for the controller of the windows, how the steps ended, and a
    result."""

    y1: PyTree
    y: Float[Array, " N D"] | None
    fine_steps: FineSteps
    y_error: PyTree
    outcome: Outcome
    result: dfx.RESULTS


# Diffrax traces a step four times. A jitted function is traced once.
@eqx.filter_jit
def make_controlled_window(
    step_map: AbstractStepMap,
    solver: dfx.AbstractSolver,
    solve: Solve,
    window: WindowStart,
    error_order: Any,
    capacity: int,
    stores_states: bool,
    kernels: str,
) -> ControlledWindow:
    """Makes the steps of a window as the controller of the `solve` asks for. `solver` and `step_map` are the base solver and
    its steps. The initial state has the form of `step_map.begin`.

    Dense output is that of all steps if Diffrax keeps it or the states shall be stored (`stores_states`). Otherwise it is
    that of the steps that contain requested times, and of the last one. If the solve is a single window, it ends with the
    step in which an event occurs.

    In derivatives, the ends of steps inside the window are constants, unless a `ClipStepSizeController` is given times.

    A window with more than `capacity` steps has an error estimate with which a `PIDController` rejects it, and tries one
    that fits. That of any other window lets it grow until it is nearly full.
    """
    t0, t1, controller = window.t0, window.t1, solve.controller
    adaptive = adaptive_part(controller)
    assert adaptive is not None
    # Where an output depends on the step before its own too, all are kept.
    joins = step_map.joins_steps and len(solve.requested) > 0
    ends_at_event = solve.event is not None and isinstance(controller, SingleWindow)
    keeps_all = solve.dense or stores_states or joins or (solve.event is not None and not ends_at_event)
    if not keeps_all and len(solve.requested) > 0 and on_cpu(kernels) and _keeps_stages(step_map, window):
        step_map = StepWithStages.of(step_map)
        window = replace(window, y0=step_map.start(t0, t1, window.y0))
    y0, ravel = window.y0, Ravel(window.y0)
    trial = make_trial(step_map, solver, adaptive)
    conditions = None
    if solve.event is not None and ends_at_event:
        conditions = EndConditions.make(solve.event, t0, step_map.end(y0)[0], *solve.event_arguments)
    arrays, moving = stop_gradient((trial, adaptive, window, conditions)), _MovingTimes.of(controller, t0, t1)
    steps = ControlledSteps(*arrays, error_order, ravel, capacity, kernels)

    def step(y, times):
        (begin, end), y1 = times
        return ravel.ravel(step_map(moving(begin), moving(end), ravel.unravel(y), ravel.unravel(y1)).y1)

    make = _all_steps if keeps_all else _some_steps
    outcome, y, index, kept = make(steps, step, y0, solve.requested)
    # (Tangents of zero would be tangents: Diffrax's Brownian paths refuse them.)
    times = lambda x: (x[0].end, x[1], x[2].begins, x[2].ends)
    outcome, index, kept = eqx.tree_at(times, (outcome, index, kept), replace_fn=stop_gradient)
    finite = jnp.all(jnp.isfinite(outcome.y))
    nonfinite = dfx.RESULTS.promote(optx.RESULTS.nonfinite)
    result = dfx.RESULTS.where(finite | ~dfx.is_successful(outcome.result), outcome.result, nonfinite)
    valid, ended = dfx.is_successful(result), outcome.reached | steps.stopped(outcome)
    # Where a single window ran out of steps, its states are right as far as they go.
    right = valid if isinstance(controller, SingleWindow) else valid & ended
    y1 = ravel.unravel(nan_derivative_unless(right, outcome.y))
    begins, ends = moving(kept.begins), moving(kept.ends)
    if isinstance(step_map, StepWithStages):
        (before, _), (after, stages) = jax.vmap(ravel.unravel)(kept.before), jax.vmap(ravel.unravel)(kept.after)
        infos = {"y0": before, "y1": after, "k": stages}
    else:
        infos = RepeatedSteps.of(step_map, begins, ends, kept.before, kept.after, ravel)
        if solve.keeps_dense_output or not infos.can_be_kept:
            infos = infos.all_infos()
    end = jnp.where(outcome.reached, t1, outcome.end)
    last = None if outcome.events is None else (cast(LatestStep, outcome.latest).begin, *outcome.events)
    states = None
    if solve.event is not None and not ends_at_event and may_end_elsewhere(solver):
        states, _ = step_map.end(jax.vmap(ravel.unravel)(kept.after))
    solved = kept.made & valid
    fine_steps = FineSteps(index, infos, kept.made, solved, end, (begins, ends), last, states=states)
    # It counts only if the controller of the windows accepts it, as it does at its smallest step.
    exhausted = dfx.RESULTS.where(ended, dfx.RESULTS.successful, dfx.RESULTS.max_steps_reached)
    result = dfx.RESULTS.where(valid, exhausted, result)
    y_error = _window_error(step_map, adaptive, error_order, y0, y1, outcome, t0, t1, capacity)
    y1 = y1[0] if isinstance(step_map, StepWithStages) else y1
    return ControlledWindow(y1, y, fine_steps, y_error, outcome, result)


def _keeps_stages(step_map: AbstractStepMap, window: WindowStart) -> TypeGuard[ExplicitRungeKuttaStep]:
    """Whether the stages of a step are kept with the state after it, and not made again where there are outputs."""
    if not isinstance(step_map, ExplicitRungeKuttaStep) or Ravel(window.y0).size > _LARGEST_WITH_STAGES:
        return False
    return step_map.is_costly(window.t0, window.t1, window.y0)


def _all_steps(steps: ControlledSteps, step, y0, requested):
    """Makes and keeps all steps: how they ended and the states after them, with derivatives, the times to which each
    serves, and the steps."""
    del requested
    ravel, t1, capacity = steps.ravel, steps.window.t1, steps.limit
    outcome, kept = keep_in_checkpoint(make_and_store_steps(steps))
    inputs = (kept.begins, kept.ends), stop_gradient(kept.after)
    recurrence = Recurrence.make(step, ravel.ravel(y0), inputs, capacity)
    outcome = _verified(steps, outcome)
    if has_forward_mode(recurrence.step, recurrence.init, recurrence.first_input):
        y, outcome = with_sequential_derivative(recurrence, kept.after, outcome, steps.kernels)
    else:
        y = with_reverse_derivative(recurrence, kept.after, jnp.all(jnp.isfinite(kept.after), axis=1))
        # Entries after the last step are steps of length zero.
        outcome = eqx.tree_at(lambda outcome: outcome.y, outcome, y[-1])
    end = jnp.where(steps.stopped(outcome), outcome.end, t1)
    index = jnp.concatenate([steps.window.t0[None], jnp.where(kept.made, kept.ends, end)])
    kept = KeptSteps(kept.index, kept.begins, kept.ends, recurrence.previous(y), y, kept.made | outcome.reached)
    return outcome, y, index, kept


def _some_steps(steps: ControlledSteps, step, y0, requested):
    """Makes all steps and keeps those that contain requested times, and the last one. Returns what `_all_steps` does,
    without the states."""
    ravel, t0 = steps.ravel, steps.window.t0
    made = lambda stores_times: _make_some_steps(steps, requested, stores_times)
    # In programs that are not differentiated nothing stores the times of steps. (On a CPU a loop without outputs takes a
    # third of the time.)
    outcome, times, kept = keep_in_checkpoint(made(True))
    plain, _, plain_kept = made(False)
    assert times is not None
    example = (times.t0, times.t0), outcome.y
    map = eqx.filter_closure_convert(step, ravel.ravel(y0), example)

    def make(y, times):
        begin, end = times
        output = steps.trial.step_map(begin, end, ravel.unravel(y))
        return jnp.where(dfx.is_successful(output.result), ravel.ravel(output.y1), jnp.nan)

    make = without_tangents(make, outcome.y, example[0])
    # With the stages of a step, the state after it is kept too.
    keeps_after = isinstance(steps.trial.step_map, StepWithStages)
    rows = (lambda before, after: jnp.concatenate([before, after])) if keeps_after else (lambda before, _: before)
    whole = lambda before: jnp.pad(before, ((0, 0), (0, ravel.size - before.shape[1])))
    replayed = MadeSteps(map, make, ravel.ravel(y0), times, outcome.count, rows(kept.index, kept.index + 1))
    states = [
        KeptStates(outcome.y, rows(whole(kept.before), kept.after), (outcome, kept))
        for outcome, kept in ((_verified(steps, outcome), kept), (_verified(steps, plain), plain_kept))
    ]
    found, in_plain_programs = states
    states = with_replayed_derivative(replayed, found, in_plain_programs, steps.kernels)
    outcome, kept = states.outcome
    outcome = eqx.tree_at(lambda outcome: outcome.y, outcome, states.y)
    before, after = jnp.split(states.before, 2) if keeps_after else (states.before, kept.after)
    kept = eqx.tree_at(lambda kept: (kept.before, kept.after), kept, (before, after))
    end = outcome.end
    ts = stop_gradient(_sorted(requested, t0))
    index = jnp.concatenate([t0[None], jnp.clip(ts, t0, end), end[None]])
    return outcome, None, index, kept


def _make_some_steps(steps: ControlledSteps, requested, stores_times: bool):
    """The outcome, the times of steps, and the steps to keep."""
    # (On a CPU, a loop in a batch is faster if it stores few steps at a time.)
    stores_few = stores_times and on_cpu(steps.kernels)
    if len(requested) == 0 and steps.conditions is None and not stores_few:
        outcome, times = make_steps(steps, stores_times)
        return outcome, times, last_step(steps, outcome)
    outcome, times, kept = make_steps_with_outputs(
        steps, stop_gradient(_sorted(requested, steps.window.t0)), stores_times
    )
    return outcome, times, jtu.tree_map(lambda a, b: jnp.concatenate([a, b]), kept, last_step(steps, outcome))


def _sorted(requested: list[Array], t0: Float[Array, ""]) -> Float[Array, " M"]:
    """All requested times."""
    return jnp.sort(jnp.concatenate([jnp.zeros(0, t0.dtype), *(ts.astype(t0.dtype) for ts in requested)]))


class _MovingTimes(eqx.Module):
    """Times inside a window as functions of its ends `t0` and `t1`.

    They have the tangents of `t0` and `t1` where they are equal. With a `ClipStepSizeController`, all move with the times
    that it is given, and keep their relative places between two of them. The field may jump there, and the last stage before
    may lie beyond the jump. If only the last step became longer, that stage would count in full. (For smooth fields the
    derivative for `t1` is more accurate if only the last step does.)
    """

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    knots: Float[Array, " K"] | None

    @classmethod
    def of(cls, controller: Any, t0: Float[Array, ""], t1: Float[Array, ""]) -> "_MovingTimes":
        """Those of a solve under this controller."""
        listed = []
        while controller is not None:
            if isinstance(controller, dfx.ClipStepSizeController):
                listed += [ts for ts in (controller.step_ts, controller.jump_ts) if ts is not None]
            controller = getattr(controller, "controller", None)
        if len(listed) == 0:
            return cls(t0, t1, None)
        knots = jnp.concatenate([t0[None], *(jnp.clip(ts.astype(t0.dtype), t0, t1) for ts in listed)])
        return cls(t0, t1, jnp.concatenate([jnp.sort(knots), t1[None]]))

    def __call__(self, times: Float[Array, "*n"]) -> Float[Array, "*n"]:
        if self.knots is None:
            tangents = [jnp.where(times == t, t - stop_gradient(t), 0) for t in (self.t0, self.t1)]
            return times + tangents[0] + tangents[1]
        knots = self.knots
        index = jnp.clip(jnp.searchsorted(stop_gradient(knots), times, side="right"), 1, knots.shape[0] - 1)
        before, after = knots[index - 1], knots[index]
        span = after - before
        share = stop_gradient(
            jnp.where(jnp.isfinite(span) & (span > 0), (times - before) / jnp.where(span > 0, span, 1), 0)
        )
        moving = before + jnp.where(share > 0, share * span, 0)
        return times + (moving - stop_gradient(moving))


def _verified(steps: ControlledSteps, outcome: Outcome) -> Outcome:
    """The outcome, with a last state of NaN if a kernel made the last step wrongly. (A kernel that was compiled wrongly is
    wrong in nearly all steps.) It makes that step once more in XLA."""
    if outcome.latest is None or on_cpu(steps.kernels):
        return outcome
    outcome, ravel, controller = stop_gradient(outcome), steps.ravel, cast(Any, steps.controller)
    latest = cast(LatestStep, outcome.latest)
    begin, end, state = latest.begin, outcome.end, ravel.unravel(latest.before)
    again = ravel.ravel(steps.trial.step(begin, end, state, steps.trial.cache(begin, end, state), False)[0])
    relative, absolute = jnp.asarray(jnp.finfo(again.dtype).eps ** 0.5, again.dtype), jnp.zeros((), again.dtype)
    if not steps.trial.step_map.explicit:
        # A root finder that starts elsewhere ends elsewhere, within its tolerances.
        relative = jnp.maximum(relative, jnp.asarray(controller.rtol, again.dtype))
        absolute = jnp.asarray(controller.atol, again.dtype)
    tolerance = absolute + relative * jnp.max(jnp.abs(outcome.y), initial=0)
    near = jnp.all(jnp.abs(again - outcome.y) <= tolerance) | (outcome.count == 0) | ~outcome.in_kernel
    return eqx.tree_at(lambda outcome: outcome.y, outcome, jnp.where(near, outcome.y, jnp.nan))


# The next window is to have this fraction of the steps for which there is room.
_FILL = 0.8


def _window_error(step_map, controller, error_order, y0, y1, outcome: Outcome, t0, t1, capacity: int) -> PyTree:
    """An error estimate from which a `PIDController` chooses the length of the next window. The controller accepted every
    step, so it tells only how full the window was."""
    (y0, _), (y1, _) = stop_gradient((step_map.end(y0), step_map.end(y1)))
    valid = dfx.is_successful(outcome.result)
    if not isinstance(controller, dfx.PIDController):
        # A failure is accepted, so that the solve ends with it.
        return jtu.tree_map(lambda y: jnp.where(valid & ~outcome.reached, jnp.inf, jnp.zeros_like(y, _real(y))), y1)
    order = error_order if controller.error_order is None else controller.error_order
    exponent = (controller.icoeff + controller.pcoeff + controller.dcoeff) / order
    # The factor by which to change the length, and the scaled error after which the controller does.
    reached = (outcome.end - t0) / jnp.where(t1 > t0, t1 - t0, 1)
    room = _FILL * capacity / jnp.maximum(outcome.tried, 1).astype(t0.dtype)
    factor = stop_gradient(jnp.where(outcome.reached, room, _FILL * reached))
    # In the precision of the state, which may differ from that of times.
    size = jnp.asarray(controller.norm(jtu.tree_map(lambda y: jnp.ones_like(y, _real(y)), y1)))
    factor = jnp.clip(factor, 1e-3, 1e3).astype(size.dtype)
    error = jnp.exp(jnp.log(controller.safety / factor) / exponent)
    error = jnp.where(outcome.reached | ~valid, jnp.minimum(error, 0.9), jnp.maximum(error, 1.1))

    def scale(a, b):
        return (controller.atol + controller.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b))).astype(_real(b))

    error = error / size
    return jtu.tree_map(lambda a, b: error.astype(_real(b)) * scale(a, b), y0, y1)


def _real(y):
    return jnp.finfo(y.dtype).dtype
