"""The first event in a window, at the ends of its fine steps."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._recurrence import num_leading_true, stop_gradient
from .._scan import preceded_by, with_row
from ._interpolation import WindowInterpolation


class Crossing(eqx.Module):
    """The first fine step of a window in which an event occurs."""

    found: Bool[Array, ""]
    # The index of the fine step; the last index if no event occurs.
    step: Int[Array, ""]
    # Which condition function triggers. At most one entry is true: if several trigger in the same fine step, the first in
    # the pytree counts, as in Diffrax.
    mask: PyTree[Bool[Array, ""]]
    # Whether a condition function is NaN before any event.
    undefined: Bool[Array, ""]


def first_crossing(
    cond_fn: PyTree[Callable],
    direction: PyTree,
    before: PyTree,
    after: PyTree,
    window: WindowInterpolation,
    args: PyTree,
    **kwargs: Any,
) -> Crossing:
    """Evaluates every condition of a `diffrax.Event` at the ends of all fine steps at once, and finds the first event,
    without derivatives.

    Events follow Diffrax's definition, applied to fine steps. A boolean condition triggers if it is true at the end of a
    step. A float triggers if its sign changes over the step (`direction=None`), if it becomes positive (`True`), or if it
    stops being positive (`False`). NaN is not a change of sign. Events are sought only before the first step that is not
    `solved`. `before` and `after` are the values of the conditions at the ends of the window; unused for booleans.
    """
    window, args, kwargs, before, after = stop_gradient((window, args, kwargs, before, after))
    ends = window.steps.ts[1:]
    num_steps, ys = ends.shape[0], jax.vmap(window.end_of_step)(jnp.arange(ends.shape[0]))
    solved = jnp.arange(num_steps) < num_leading_true(window.steps.solved)

    def events_of(cond_fn, direction, before, after):
        values = jax.vmap(lambda t, y: cond_fn(t, y, args, **kwargs))(ends, ys)
        if values.dtype == bool:
            return solved & values, jnp.zeros_like(solved)
        # Diffrax itself evaluated the condition at the end of the window.
        values = with_row(values, -1, after)
        return solved & _changes(preceded_by(before, values), values, direction), solved & jnp.isnan(values)

    structure = jtu.tree_structure(cond_fn, is_leaf=callable)
    pairs = structure.flatten_up_to(jtu.tree_map(events_of, cond_fn, direction, before, after, is_leaf=callable))
    events, undefined = (jnp.stack([pair[k] for pair in pairs]) for k in range(2))
    step = num_leading_true(~jnp.any(events, axis=0))
    first_nan = num_leading_true(~jnp.any(undefined, axis=0))
    found = (step < num_steps) & (step <= first_nan)
    step = jnp.minimum(step, num_steps - 1)
    at_step = events[:, step] & found
    mask = structure.unflatten(list(at_step & (jnp.cumsum(at_step) == 1)))
    return Crossing(found, step, mask, (first_nan < num_steps) & ~found)


def time_of_event(
    cond_fn: PyTree[Callable],
    root_finder: Any,
    mask: PyTree[Bool[Array, ""]],
    window: WindowInterpolation,
    args: PyTree,
    **kwargs: Any,
) -> tuple[Float[Array, ""], Any]:
    """The time within `window`, the step in which the event of `mask` occurs, at which its condition is zero, by the
    `root_finder`, and the result of the search (`optimistix.RESULTS`). A boolean event occurs at the end of the step.

    By the implicit function theorem, `dt = -dF / F_t` for the condition `F(t)` along the solution. (Where the search failed,
    JAX's `custom_root` divides by what it finds. The derivative of `optimistix.root_find` would raise an error there, for a
    whole batch.)
    """
    lower, upper = window.t0, window.t1

    def distance(t):
        conditions = zip(jtu.tree_leaves(mask), jtu.tree_leaves(cond_fn, is_leaf=callable))
        values = [value_if(triggered, condition, t) for triggered, condition in conditions]
        # Without an event, as in another member of a batch, the end of the step.
        return jnp.where(jnp.any(jnp.stack(jtu.tree_leaves(mask))), sum(values[1:], values[0]), upper - t)

    def value_if(triggered, condition, t):
        def of_condition():
            value = condition(t, window.evaluate(t), args, **kwargs)
            is_boolean = jnp.issubdtype(jnp.result_type(value), jnp.bool_)
            return upper - t if is_boolean else jnp.asarray(value, t.dtype)

        return lax.cond(triggered, of_condition, lambda: jnp.zeros_like(t))

    def search(fn, start):
        options = {"lower": lower, "upper": upper}
        found = optx.root_find(lambda t, _: fn(t), root_finder, start, options=options, throw=False)
        # (`custom_root` needs numbers that can have tangents.)
        return found.value, jtu.tree_map(lambda code: jnp.asarray(code, start.dtype), found.result)

    t, result = lax.custom_root(distance, upper, search, lambda slope, y: y / slope(jnp.ones_like(y)), has_aux=True)
    return t, jtu.tree_map(lambda code: code.astype(jnp.int32), result)


class EndConditions(eqx.Module):
    """The conditions of a `diffrax.Event`, to be evaluated at the end of every step while steps are made.

    - `functions`: each condition, as a function of the time and the state.
    - `directions`: those of the event.
    """

    functions: tuple[Callable, ...]
    directions: tuple[bool | None, ...] = eqx.field(static=True)
    structure: Any = eqx.field(static=True)

    @staticmethod
    def make(event: dfx.Event, t, y: PyTree, args: PyTree, kwargs: dict[str, Any]) -> "EndConditions":
        """The conditions without tracers in closures, from an example of a time and a state."""
        functions, structure = jtu.tree_flatten(event.cond_fn, is_leaf=callable)
        directions = tuple(structure.flatten_up_to(event.direction))

        def converted(cond_fn):
            return eqx.filter_closure_convert(lambda t, y: cond_fn(t, y, args, **kwargs), t, y)

        return EndConditions(tuple(map(converted, functions)), directions, structure)

    def values(self, t, y: PyTree) -> tuple[Array, ...]:
        """The values of the conditions."""
        return tuple(jnp.asarray(function(t, y)) for function in self.functions)

    def ends(self, before: tuple, after: tuple) -> Bool[Array, ""]:
        """Whether a step with these values before and after it is the last one."""
        crossing = last_step_crossing(self.structure, self.directions, before, after)
        return crossing.found | crossing.undefined


def last_step_crossing(structure, directions, before: tuple, after: tuple) -> Crossing:
    """The event in the last step that was made, from the values of all conditions before and after it: see
    `first_crossing`. `structure` is that of the conditions."""
    events, undefined = [], jnp.array(False)
    for old, new, direction in zip(before, after, directions):
        if new.dtype == bool:
            events.append(new)
        else:
            events.append(_changes(old, new, direction))
            undefined = undefined | jnp.isnan(new)
    found, mask = jnp.array(False), []
    for event in events:
        mask.append(event & ~found)
        found = found | event
    return Crossing(found, jnp.zeros((), jnp.int32), structure.unflatten(mask), undefined & ~found)


def _changes(previous: Float[Array, "*n"], values: Float[Array, "*n"], direction: bool | None) -> Bool[Array, "*n"]:
    old, new = jnp.sign(previous), jnp.sign(values)
    if direction is None:
        return (old != new) & ~jnp.isnan(old) & ~jnp.isnan(new)
    return (old <= 0) & (new > 0) if direction else (old > 0) & (new <= 0)
