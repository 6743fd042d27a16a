"""Steps of the lengths that a step-size controller chooses, one after the other: a whole adaptive solve as one loop."""

from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._kernels import indexed_loop, on_cpu
from .._recurrence import Ravel, stop_gradient, without_tangents
from .._scan import preceded_by
from ._statistics import Pace
from ._step_map import AbstractTrial
from ._window import before


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
    go on. `latest` is the beginning of the last step and the state there, with which a step that a kernel made
    (`in_kernel`) is verified; `None` where no kernel runs."""

    end: Float[Array, ""]
    y: Float[Array, " D"]
    count: Int[Array, ""]
    tried: Int[Array, ""]
    reached: Bool[Array, ""]
    result: dfx.RESULTS
    pace: Pace
    latest: tuple | None
    in_kernel: Bool[Array, ""]


class AcceptedSteps(eqx.Module):
    """The accepted steps of an adaptive solve, in arrays for at most `N`. Step `k` goes from `begins[k]` to `ends[k]`, where
    its state is `y[k]`. Entries after the last step repeat it."""

    begins: Float[Array, " N"]
    ends: Float[Array, " N"]
    y: Float[Array, " N D"]


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
    # The beginning of the last accepted step and the state there. `None` where no kernel runs.
    latest: tuple | None


def control_steps(
    trial: AbstractTrial,
    controller: dfx.AbstractStepSizeController,
    window: WindowStart,
    ravel: Ravel,
    error_order: Any,
    capacity: int,
    store: bool,
    kernels: str,
) -> tuple[Outcome, AcceptedSteps | None]:
    """Makes the steps of a window as `diffrax.diffeqsolve` does: the `controller` accepts or rejects each, and chooses the
    next. After `capacity` steps, accepted or rejected, it stops. The steps are returned if they are to be `store`d. No
    argument may have tangents.

    **Cost:** the steps, in sequence. On a GPU they are one kernel, with one thread per member of a batch, if the kernel
    compiler knows the operations of the step and the controller.
    """
    t0, t1, pace, made_jump = window.t0, window.t1, window.pace, window.made_jump
    last_end, y0 = before(t1), ravel.ravel(window.y0)
    state_of = lambda y: trial.step_map.end(ravel.unravel(y))[0]
    # A `PIDController` by itself makes no jumps.
    smooth = made_jump is False and type(controller) is dfx.PIDController

    def try_step(old: _Progress) -> tuple[_Progress, tuple]:
        jumps = old.made_jump if old.made_jump is not None else False
        y1, y_error, cache, result = trial.step(old.begin, old.end, ravel.unravel(old.y), old.cache, jumps)
        y1 = ravel.ravel(y1)
        # To a controller, a step that is not finite has an infinite error, relative to its initial state. (A step that is
        # infinite would have an error of NaN, with which no `PIDController` goes on.)
        finite = jnp.all(jnp.isfinite(y1))
        y_error = jtu.tree_map(lambda x: jnp.where(finite & ~jnp.isnan(x), x, jnp.inf), y_error)
        states = state_of(old.y), state_of(jnp.where(finite, y1, old.y))
        step = old.begin, old.end, *states, window.args, y_error, error_order, old.controller_state
        accepted, begin, end, jumped, controller_state, failure = controller.adapt_step_size(*step)
        length, begin = end - begin, jnp.minimum(begin, t1)
        # A step that the window cut short says little about the next one.
        cut = accepted & (old.end >= t1) & (old.length > length)
        length = jnp.where(cut, old.length, length)
        if isinstance(controller, dfx.PIDController):
            # Its state would tell that the next step is of the smallest length, and that it must be accepted.
            controller_state = jtu.tree_map(
                lambda new, kept: jnp.where(cut, kept, new), controller_state, old.controller_state
            )
        end = jnp.where(end > last_end, jnp.where(accepted, t1, begin + 0.5 * (t1 - begin)), end)
        result = dfx.RESULTS.where(accepted, result, dfx.RESULTS.successful)
        kept = lambda new, old: jtu.tree_map(lambda new, old: jnp.where(accepted, new, old), new, old)
        new = _Progress(
            begin=begin,
            end=end,
            length=length,
            y=kept(y1, old.y),
            cache=kept(cache, old.cache),
            controller_state=controller_state,
            made_jump=None if smooth else kept(jumped, old.made_jump),
            count=jnp.where(accepted, old.count + 1, old.count),
            tried=old.tried + 1,
            result=dfx.RESULTS.where(dfx.is_successful(result), failure, result),
            latest=None if old.latest is None else kept((old.begin, old.y), old.latest),
        )
        # Without jumps, a step begins where the one before ends.
        output = (None if smooth else old.begin, old.end, y1)
        return new, output if store else ()

    first_end = t0 + pace.length
    first_end = jnp.where(first_end > last_end, t1, first_end)
    zero = jnp.zeros((), jnp.int32)
    start = _Progress(
        begin=t0,
        end=first_end,
        length=pace.length,
        y=y0,
        cache=trial.cache(t0, first_end, window.y0),
        controller_state=pace.state,
        made_jump=None if smooth else jnp.asarray(made_jump),
        count=zero,
        tried=zero,
        result=dfx.RESULTS.successful,
        latest=None if on_cpu(kernels) else (t0, y0),
    )
    start = jtu.tree_map(_strong, stop_gradient(start))

    def one_step(old):
        new, output = try_step(old)
        return jtu.tree_map(lambda new, old: jnp.asarray(new, old.dtype), new, old), output

    one_step = without_tangents(one_step, start)

    def next_index(state):
        unfinished = (state.begin < t1) & dfx.is_successful(state.result) & (state.tried < capacity)
        return jnp.where(unfinished, 0, -1)

    def body(old, _):
        new, output = one_step(old)
        return new, output, old.count, next_index(new)

    last, stored, in_kernel = indexed_loop(body, start, next_index(start), (), capacity if store else 0, kernels)
    count, tried = (x.astype(jnp.result_type(int)) for x in (last.count, last.tried))
    pace = Pace(last.length, last.controller_state)
    outcome = Outcome(last.begin, last.y, count, tried, last.begin >= t1, last.result, pace, last.latest, in_kernel)
    if not store:
        return outcome, None
    begins, ends, y = stored
    begins = preceded_by(t0, ends) if begins is None else begins
    made = jnp.arange(capacity, dtype=count.dtype) < count
    begins, ends = (jnp.where(made, x, last.begin) for x in (begins, ends))
    return outcome, AcceptedSteps(begins, ends, jnp.where(made[:, None], y, last.y[None]))


def _strong(x):
    """Without the weak type of a Python number: the types of a loop may not change."""
    x = jnp.asarray(x)
    return lax.convert_element_type(x, x.dtype)
