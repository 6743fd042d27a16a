"""A window whose steps an adaptive step-size controller chooses, one after the other."""

import functools
from dataclasses import fields
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._kernels import has_forward_mode
from .._recurrence import (
    keep_in_checkpoint,
    nan_derivative_unless,
    Ravel,
    Recurrence,
    stop_gradient,
    with_reverse_derivative,
    with_sequential_derivative,
)
from .._scan import preceded_by
from ._compat import Solve
from ._controlled_steps import control_steps, Outcome, WindowStart
from ._interpolation import FineSteps, RepeatedSteps
from ._statistics import Pace
from ._step_map import AbstractStepMap, AbstractTrial, make_trial


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
    """The outputs of a window: the state of the recurrence at its end, the raveled ones after each step, the steps as dense
    output needs them, the error estimate for the controller of the windows, how the steps ended, and a result."""

    y1: PyTree
    y: Float[Array, " N D"]
    fine_steps: FineSteps
    y_error: PyTree
    outcome: Outcome
    result: dfx.RESULTS


def make_controlled_window(
    step_map: AbstractStepMap,
    solver: dfx.AbstractSolver,
    solve: Solve,
    window: WindowStart,
    error_order: Any,
    capacity: int,
    kernels: str,
) -> ControlledWindow:
    """Makes the steps of a window as the controller of the `solve` asks for. `solver` and `step_map` are the base solver and
    its steps. The initial state has the form of `step_map.begin`. Dense output is computed in advance if Diffrax keeps it,
    otherwise where it is wanted.

    In derivatives, the ends of steps inside the window are constants, unless a `ClipStepSizeController` is given times.

    A window with more than `capacity` steps has an error estimate with which a `PIDController` rejects it, and tries one
    that fits. That of any other window lets it grow until it is nearly full.
    """
    t0, t1, y0, controller = window.t0, window.t1, window.y0, solve.controller
    ravel, adaptive = Ravel(y0), adaptive_part(controller)
    assert adaptive is not None
    trial = make_trial(step_map, solver, adaptive)
    arrays = stop_gradient((trial, adaptive, window))
    control = functools.partial(_control_steps, *arrays, ravel, error_order, capacity, kernels=kernels)
    outcome, steps = keep_in_checkpoint(control(store=True))
    assert steps is not None
    # On a CPU a loop that stores its steps takes three times as long. If nothing reads them, XLA removes it.
    plain = outcome if solve.stores_outputs else control(store=False)[0]

    index = jnp.arange(capacity, dtype=outcome.count.dtype)
    begins, ends = (_moving(controller, times, t0, t1) for times in (steps.begins, steps.ends))

    def step(y, times):
        begin, end, y1 = times
        return ravel.ravel(step_map(begin, end, ravel.unravel(y), ravel.unravel(y1)).y1)

    recurrence = Recurrence.make(step, ravel.ravel(y0), (begins, ends, stop_gradient(steps.y)), capacity)
    verified = [_verified(trial, adaptive, ravel, outcome) for outcome in (outcome, plain)]
    if has_forward_mode(recurrence.step, recurrence.init, recurrence.first_input):
        outcome, plain = verified
        y, outcome = with_sequential_derivative(recurrence, steps.y, outcome, kernels, plain)
    else:
        y = with_reverse_derivative(recurrence, steps.y, jnp.all(jnp.isfinite(steps.y), axis=1))
        # Entries after the last step are steps of length zero.
        outcome = eqx.tree_at(lambda outcome: outcome.y, verified[0], y[-1])
    finite = jnp.all(jnp.isfinite(outcome.y))
    nonfinite = dfx.RESULTS.promote(optx.RESULTS.nonfinite)
    result = dfx.RESULTS.where(finite | ~dfx.is_successful(outcome.result), outcome.result, nonfinite)
    valid = dfx.is_successful(result)
    y1 = ravel.unravel(nan_derivative_unless(valid & outcome.reached, outcome.y))
    previous = preceded_by(recurrence.init, y)
    infos = RepeatedSteps.of(step_map, begins, ends, previous, y, ravel)
    if solve.keeps_dense_output or not infos.can_be_kept:
        infos = infos.all_infos()
    ts = jnp.concatenate([t0[None], jnp.where(index < outcome.count, ends, t1)])
    made = (index < outcome.count) | outcome.reached
    fine_steps = FineSteps(ts, infos, made, made & valid, jnp.where(outcome.reached, t1, outcome.end))
    # It counts only if the controller of the windows accepts it, as it does at its smallest step.
    exhausted = dfx.RESULTS.where(outcome.reached, dfx.RESULTS.successful, dfx.RESULTS.max_steps_reached)
    result = dfx.RESULTS.where(valid, exhausted, result)
    y_error = _window_error(step_map, adaptive, error_order, y0, y1, outcome, t0, t1, capacity)
    return ControlledWindow(y1, y, fine_steps, y_error, outcome, result)


def _moving(
    controller: Any, times: Float[Array, " N"], t0: Float[Array, ""], t1: Float[Array, ""]
) -> Float[Array, " N"]:
    """`times`, with the tangents of `t0` and `t1` where they are equal.

    With a `ClipStepSizeController`, all move with the times that it is given, and keep their relative places between two of
    them. The field may jump there, and the last stage before may lie beyond the jump. If only the last step became longer,
    that stage would count in full. (For smooth fields the derivative for `t1` is more accurate if only the last step does.)
    """
    listed = []
    while controller is not None:
        if isinstance(controller, dfx.ClipStepSizeController):
            listed += [ts for ts in (controller.step_ts, controller.jump_ts) if ts is not None]
        controller = getattr(controller, "controller", None)
    if len(listed) == 0:
        tangents = [jnp.where(times == t, t - stop_gradient(t), 0) for t in (t0, t1)]
        return times + tangents[0] + tangents[1]
    knots = [t0[None], *(jnp.clip(ts.astype(times.dtype), t0, t1) for ts in listed)]
    knots = jnp.concatenate([jnp.sort(jnp.concatenate(knots)), t1[None]])
    index = jnp.clip(jnp.searchsorted(stop_gradient(knots), times, side="right"), 1, knots.shape[0] - 1)
    before, after = knots[index - 1], knots[index]
    span = after - before
    share = stop_gradient(
        jnp.where(jnp.isfinite(span) & (span > 0), (times - before) / jnp.where(span > 0, span, 1), 0)
    )
    moving = before + jnp.where(share > 0, share * span, 0)
    return times + (moving - stop_gradient(moving))


def _verified(trial: AbstractTrial, controller: Any, ravel: Ravel, outcome: Outcome) -> Outcome:
    """The outcome, with a last state of NaN if a kernel made the last step wrongly. (A kernel that was compiled wrongly is
    wrong in nearly all steps.) It makes that step once more in XLA."""
    if outcome.latest is None:
        return outcome
    trial, outcome = stop_gradient((trial, outcome))
    assert outcome.latest is not None
    (begin, before), end = outcome.latest, outcome.end
    state = ravel.unravel(before)
    again = ravel.ravel(trial.step(begin, end, state, trial.cache(begin, end, state), False)[0])
    relative, absolute = jnp.asarray(jnp.finfo(again.dtype).eps ** 0.5, again.dtype), jnp.zeros((), again.dtype)
    if not trial.step_map.explicit:
        # A root finder that starts elsewhere ends elsewhere, within its tolerances.
        relative = jnp.maximum(relative, jnp.asarray(controller.rtol, again.dtype))
        absolute = jnp.asarray(controller.atol, again.dtype)
    tolerance = absolute + relative * jnp.max(jnp.abs(outcome.y), initial=0)
    near = jnp.all(jnp.abs(again - outcome.y) <= tolerance) | (outcome.count == 0) | ~outcome.in_kernel
    return eqx.tree_at(lambda outcome: outcome.y, outcome, jnp.where(near, outcome.y, jnp.nan))


# Diffrax traces a step three times. A jitted function is traced once.
_control_steps = eqx.filter_jit(control_steps)

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
