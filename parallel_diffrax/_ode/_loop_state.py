"""The state of Diffrax's loop over steps, which is private. No other file knows it.

`AbstractAdjoint.loop` is a public method that receives and returns this state, so every adjoint needs it. This file relies
on the fields below. It relies on `loop` to call the `while` loop over outputs once per request within a step, and the
`while` loop over steps once. Diffrax's own code makes, accepts, counts and finishes the windows. If a release changes
the fields or the arguments of `loop`, `tests/test_loop_state.py` fails; if it changes the fields, `ParallelAdjoint` raises.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffrax as dfx
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from diffrax._integrate import loop, SaveState, State

from .._recurrence import keep_in_checkpoint, nan_derivative_unless
from ._events import first_crossing, last_step_crossing, time_of_event
from ._interpolation import FineSteps, WindowInterpolation
from ._saving import discard_after, Reserved, write_outputs


_EVENT_FIELDS = ("event_tprev", "event_tnext", "event_dense_info", "event_values", "event_mask")

# The fields in Diffrax 0.7.2.
FIELDS: dict[type, tuple[str, ...]] = {
    State: (
        *("y", "tprev", "tnext", "made_jump", "solver_state", "controller_state", "progress_meter_state", "result"),
        *("num_steps", "num_accepted_steps", "num_rejected_steps"),
        *("save_state", "dense_ts", "dense_infos", "dense_save_index"),
        *_EVENT_FIELDS,
    ),
    SaveState: ("saveat_ts_index", "ts", "ys", "save_index"),
    dfx.SubSaveAt: ("t0", "t1", "ts", "steps", "fn"),
    dfx.Event: ("cond_fn", "root_finder", "direction"),
}
# The arguments of `loop`.
LOOP_ARGUMENTS = (
    *("solver", "stepsize_controller", "event", "saveat", "progress_meter"),
    *("t0", "t1", "dt0", "max_steps", "terms", "args", "init_state"),
    *("inner_while_loop", "outer_while_loop"),
)


def run_loop(repeat: Callable, *, init_state, event: dfx.Event | None, **kwargs) -> tuple[Any, dict]:
    """Runs Diffrax's loop over windows with `repeat`, a loop like `repeat_windows`. It saves the outputs of a window at once
    and locates events on fine steps. Other arguments and results are those of `diffrax.AbstractAdjoint.loop`, without the
    arguments that Diffrax's own adjoints discard."""
    for cls, fields in FIELDS.items():
        found = tuple(cls.__dataclass_fields__)
        if sorted(found) != sorted(fields):
            raise RuntimeError(
                f"`diffeqsolve(..., adjoint=ParallelAdjoint())` does not know this version of Diffrax: `{cls.__name__}` has "
                f"the fields {found}, expected {fields}. Use any other adjoint, or Diffrax 0.7.2."
            )
    windows = _WindowBody(event, kwargs)
    kwargs["stepsize_controller"] = _CheckpointedController(kwargs["stepsize_controller"])
    start = init_state if event is not None else windows.with_event_fields(init_state)

    def outer_while_loop(cond_fun, body_fun, state, *, max_steps, buffers):
        del buffers

        def body(old, wanted):
            return _keep_decisions(windows.advance(body_fun, start, old, wanted))

        return windows.with_time_of_event(start, repeat(cond_fun, body, state, max_steps))

    final, stats = loop(
        init_state=start,
        event=_inert_event(event, init_state),
        inner_while_loop=_reserve_outputs,
        outer_while_loop=outer_while_loop,
        **kwargs,
    )
    final = _fail_derivatives(final)
    if final.dense_save_index is not None:
        # Diffrax compares it with an index of `searchsorted`. In its own loop it is a weakly typed integer.
        final = replace(final, dense_save_index=final.dense_save_index.astype(jnp.int32))
    return (replace(final, **dict.fromkeys(_EVENT_FIELDS)) if event is None else final), stats


def step_counts(init_state, final, num_steps: int) -> dict[str, Any]:
    """Diffrax's statistics of a finished solve in windows of `num_steps` fine steps, for its fine steps up to an event, and
    its `WindowStatistics`."""
    init = init_state.solver_state
    before = init.at(init_state.tprev, init_state.made_jump, init.base_state).statistics
    statistics = final.solver_state.statistics
    made = lambda statistics: statistics.parallel_steps + statistics.sequential_steps
    accepted = made(statistics) - made(before)
    if final.event_dense_info is not None and (steps := FineSteps.of_dense_info(final.event_dense_info)).last is None:
        ts = steps.ts
        after = (ts[1:] > final.event_tnext) & (ts[1:] > ts[:-1])
        occurred = final.result == dfx.RESULTS.event_occurred
        accepted -= jnp.where(occurred, jnp.sum(after, dtype=accepted.dtype), 0)
    dtype = jnp.result_type(final.num_steps)
    accepted = jnp.where(final.num_accepted_steps > 0, accepted, 0).astype(dtype)
    # A window that was rejected used all of its room.
    rejected = (statistics.rejected_steps - before.rejected_steps).astype(dtype) + num_steps * final.num_rejected_steps
    counts = {"num_steps": accepted + rejected, "num_accepted_steps": accepted, "num_rejected_steps": rejected}
    return counts | {"windows": statistics}


def _fail_derivatives(final):
    """`final`, with NaN derivatives if the solve failed. (A solve that ran out of steps is right as far as it went.)"""
    valid = dfx.is_okay(final.result) | (final.result == dfx.RESULTS.max_steps_reached)

    def attach(x):
        if isinstance(x, SaveState):
            return replace(x, ys=jtu.tree_map(attach, x.ys))
        return nan_derivative_unless(valid, x, True) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    save_state = jtu.tree_map(attach, final.save_state, is_leaf=lambda x: isinstance(x, SaveState))
    return replace(final, y=jtu.tree_map(attach, final.y), save_state=save_state)


class _CheckpointedController(dfx.AbstractStepSizeController):
    """A controller whose decisions the backward pass reads from memory.

    The backward pass evaluates a window again in another program, which rounds differently. A controller amplifies
    rounding: its decisions could differ, and the stored solutions would then be paired with the wrong windows.
    """

    controller: dfx.AbstractStepSizeController

    @property
    def unwrapped(self) -> dfx.AbstractStepSizeController:
        """The user's controller. See `current_solve`."""
        return self.controller

    def wrap(self, direction):
        return _CheckpointedController(self.controller.wrap(direction))

    def init(self, *args, **kwargs):
        return self.controller.init(*args, **kwargs)

    def adapt_step_size(self, *args, **kwargs):
        return keep_in_checkpoint(self.controller.adapt_step_size(*args, **kwargs))


def _keep_decisions(state):
    """Stores the state after a window for the backward pass, except the buffers of outputs and dense output, on which the
    next window does not depend."""
    kept, is_leaf = keep_in_checkpoint(state), lambda x: isinstance(x, SaveState)
    with_buffers = lambda kept, sub: replace(kept, ts=sub.ts, ys=sub.ys)
    return replace(
        kept,
        save_state=jtu.tree_map(with_buffers, kept.save_state, state.save_state, is_leaf=is_leaf),
        solver_state=replace(kept.solver_state, trajectory=state.solver_state.trajectory),
        **{name: getattr(state, name) for name in ("dense_ts", "dense_infos", "event_dense_info")},
    )


class _LocatedEvent(dfx.Event):
    """An event that is located on fine steps, not by Diffrax's loop, in place of the `original`. See `current_solve`."""

    located = True
    original: dfx.Event | None

    def __init__(self, cond_fn, root_finder, direction, original):
        super().__init__(cond_fn, root_finder, direction)
        self.original = original


class _NoEvent(_LocatedEvent):
    """An event that never happens."""

    never_happens = True


def _never(*args, **kwargs):
    return jnp.array(False)


def _inert_event(event, init_state) -> dfx.Event:
    """The event for Diffrax's loop, which must not detect events itself because it sees only the ends of windows. It still
    evaluates float conditions. Without an event, an event that never happens makes Diffrax keep the dense output of the last
    window in the state."""
    if event is None:
        return _NoEvent(_never, root_finder=None, direction=None, original=None)

    def silence(cond_fn, value):
        return _never if jnp.issubdtype(jnp.result_type(value), jnp.bool_) else cond_fn

    # The previous values are NaN (`_nan_like`), and with a direction no value crosses zero after NaN.
    cond_fn = jtu.tree_map(silence, event.cond_fn, init_state.event_values, is_leaf=callable)
    return _LocatedEvent(cond_fn, root_finder=None, direction=True, original=event)


def _nan_like(value):
    return jnp.full_like(value, jnp.nan) if jnp.issubdtype(jnp.result_type(value), jnp.floating) else value


def _reserve_outputs(cond_fun, body_fun, save_state, *, max_steps, buffers, checkpoints):
    """Replaces the loop over the outputs of a window: counts them, and leaves their slots in the buffers free."""
    del body_fun, buffers, checkpoints
    first, slot = save_state.saveat_ts_index, save_state.save_index
    index = jnp.arange(max_steps)
    due = jax.vmap(lambda k: cond_fun(replace(save_state, saveat_ts_index=k)))(index)
    count = jnp.sum(due & (index >= first), dtype=index.dtype)
    return replace(save_state, saveat_ts_index=first + count, save_index=slot + count)


def _select(pred, new, old):
    """`new` if `pred`, else `old`, in the dtypes of `old`: interpolants may be evaluated in the wider dtype of times."""
    return jtu.tree_map(lambda new, old: jnp.where(pred, jnp.asarray(new, jnp.result_type(old)), old), new, old)


def _is_sub_saveat(x):
    return isinstance(x, dfx.SubSaveAt)


class _WindowBody:
    """The body of the loop over windows: Diffrax's own, and what `ParallelAdjoint` adds to it. `kwargs` are the arguments of
    `diffrax.AbstractAdjoint.loop`."""

    def __init__(self, event: dfx.Event | None, kwargs):
        self.event = event
        self.solver, self.terms, self.args, self.saveat = (kwargs[k] for k in ("solver", "terms", "args", "saveat"))
        names = ("terms", "solver", "t0", "t1", "dt0", "saveat", "stepsize_controller", "max_steps")
        self.cond_kwargs = {name: kwargs[name] for name in names}

    def with_event_fields(self, state):
        """The state with initial values of the fields that Diffrax sets only if there is an event."""
        if state.dense_infos is not None:
            info = jtu.tree_map(lambda x: jnp.zeros(x.shape[1:], x.dtype), state.dense_infos)
        else:
            step = (self.terms, state.tprev, state.tnext, state.y, self.args, state.solver_state, state.made_jump)
            structs = eqx.filter_eval_shape(self.solver.step, *step)[2]
            info = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), structs)
        return replace(state, **dict(zip(_EVENT_FIELDS, (state.tprev, state.tprev, info, False, False))))

    def advance(self, body_fun, start, old, wanted):
        """The state after one more window. If none is `wanted`, that after an arbitrary harmless window."""
        # A finished member of a batch would otherwise solve a window of length zero, and derivatives divide by its length.
        tprev, tnext, y = _select(wanted, (old.tprev, old.tnext, old.y), (start.tprev, start.tnext, start.y))
        tnext = jnp.where(tnext > tprev, tnext, tprev + 1)
        old = replace(old, y=y, tprev=tprev, tnext=jnp.where(wanted, old.tnext, tnext))
        new = body_fun(replace(old, event_values=jtu.tree_map(_nan_like, old.event_values)))
        window = self.solver.interpolation_cls(t0=new.event_tprev, t1=new.event_tnext, **new.event_dense_info)
        if self.event is None:
            new = self.with_outputs(old, new, window, jnp.inf)
            return replace(self.stopped_early(start, new, window), event_dense_info=start.event_dense_info)
        return self.with_event(self.event, start, old, new, window)

    def with_outputs(self, old, new, window: WindowInterpolation, limit):
        """The state with the outputs up to the time `limit` in their reserved slots."""

        def write(sub, before, after):
            if sub.ts is None:
                return after
            reserved = Reserved(before.save_index, before.saveat_ts_index, after.saveat_ts_index)
            buffers = write_outputs(sub.fn, sub.ts, (after.ts, after.ys), reserved, window, limit, old.y, self.args)
            return replace(after, ts=buffers[0], ys=buffers[1])

        saved = jtu.tree_map(write, self.saveat.subs, old.save_state, new.save_state, is_leaf=_is_sub_saveat)
        return replace(new, save_state=saved)

    def stopped_early(self, start, new, window: WindowInterpolation):
        """The state after a window in which the steps ran out: at the end of the last one, with the outputs up to there."""
        early, end = new.result == dfx.RESULTS.max_steps_reached, window.steps.end
        # Without any step, nothing is saved.
        saved = self.truncated(start, new, early, jnp.where(jnp.any(window.steps.finite), end, -jnp.inf))
        return replace(new, save_state=saved, tprev=jnp.where(early, end, new.tprev))

    def with_event(self, event: dfx.Event, start, old, new, window: WindowInterpolation):
        """The state with its outputs; if an event occurs, at the end of the fine step in which it occurs first."""
        accepted = new.num_accepted_steps > old.num_accepted_steps
        if window.steps.last is not None:
            # The solve ended with the step in which the event occurs.
            begin, *values = window.steps.last
            structure = jtu.tree_structure(event.cond_fn, is_leaf=callable)
            crossing = last_step_crossing(structure, structure.flatten_up_to(event.direction), *values)
            found = inside = accepted & crossing.found
            end, y = window.steps.end, new.y
        else:
            conditions = event.cond_fn, event.direction, old.event_values, new.event_values
            crossing = keep_in_checkpoint(first_crossing(*conditions, window, self.args, **self.cond_kwargs))
            found = accepted & crossing.found
            ts = window.steps.ts
            # At the end of the window, Diffrax's own time and state are right.
            inside = found & (crossing.step < ts.shape[0] - 2)
            begin, end = ts[crossing.step], ts[crossing.step + 1]
            y = _select(inside, window.end_of_step(crossing.step), new.y)
        undefined = dfx.RESULTS.promote(optx.RESULTS.nonfinite)
        result = dfx.RESULTS.where(accepted & crossing.undefined, undefined, new.result)
        new = self.with_outputs(old, new, window, jnp.where(inside, end, jnp.inf))
        new = self.stopped_early(start, replace(new, result=result), window)
        stopped = replace(
            new,
            y=y,
            tprev=jnp.where(inside, end, new.tprev),
            event_tprev=jnp.where(found, begin, new.event_tprev),
            event_tnext=jnp.where(found, end, new.event_tnext),
            event_mask=jtu.tree_map(lambda happened: happened & found, crossing.mask),
            result=dfx.RESULTS.where(found, dfx.RESULTS.event_occurred, new.result),
            # With a root finder, `with_time_of_event` saves the event.
            save_state=self.truncated(start, new, inside, end, y if event.root_finder is None else None),
        )
        if new.dense_ts is None:
            return stopped
        last = new.dense_save_index
        return replace(stopped, dense_ts=new.dense_ts.at[last].set(jnp.where(inside, end, new.dense_ts[last])))

    def with_time_of_event(self, start, final):
        """The state after all windows, at the time of the event if there was one and it has a root finder."""
        event = self.event
        if event is None or event.root_finder is None:
            return final
        happened = jnp.any(jnp.stack(jtu.tree_leaves(final.event_mask)))

        def locate():
            step = self.solver.interpolation_cls(t0=final.event_tprev, t1=final.event_tnext, **final.event_dense_info)
            search = event.cond_fn, event.root_finder, final.event_mask
            t, result = time_of_event(*search, step, self.args, **self.cond_kwargs)
            t = nan_derivative_unless(result == optx.RESULTS.successful, t, True)
            # Without a step, an event at the start.
            y = lax.cond(final.num_steps == 0, lambda: final.y, lambda: _select(True, step.evaluate(t), final.y))
            return t, y, result

        # (In a batch, every member takes part if one has an event.)
        nothing = lambda: (final.event_tnext, final.y, optx.RESULTS.successful)
        t, y, result = lax.cond(eqxi.unvmap_any(happened), locate, nothing)
        failed = happened & (result != optx.RESULTS.successful)
        return replace(
            final,
            tprev=jnp.where(happened, t, final.tprev),
            y=_select(happened, y, final.y),
            result=dfx.RESULTS.where(failed, dfx.RESULTS.promote(result), final.result),
            save_state=self.truncated(start, final, happened, t, y),
        )

    def truncated(self, start, new, stopped, t, y=None):
        """The saved outputs, without those after `t`, the end of the last fine step, if the window `stopped` there. If the
        end of that step is to be saved, `y` is the state there."""

        def truncate(sub, empty, after):
            buffers = (after.ts, after.ys)
            kept, saved = discard_after(t, buffers, after.save_index, (empty.ts, empty.ys))
            if sub.steps != 0 and y is not None:
                due = new.num_accepted_steps % sub.steps == 0
                slot = jnp.minimum(saved, after.ts.shape[0] - 1)
                values = (t, sub.fn(t, y, self.args))
                kept = jtu.tree_map(lambda b, v: b.at[slot].set(_select(due, v, b[slot])), kept, values)
                saved = saved + due.astype(saved.dtype)
            ts, ys = _select(stopped, kept, buffers)
            return replace(after, ts=ts, ys=ys, save_index=_select(stopped, saved, after.save_index))

        return jtu.tree_map(truncate, self.saveat.subs, start.save_state, new.save_state, is_leaf=_is_sub_saveat)
