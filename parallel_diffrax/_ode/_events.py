"""The first event in a window, at the ends of its fine steps."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
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
    num_steps, ys = ends.shape[0], jax.vmap(window.evaluate)(ends)
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


def _changes(previous: Float[Array, " N"], values: Float[Array, " N"], direction: bool | None) -> Bool[Array, " N"]:
    old, new = jnp.sign(previous), jnp.sign(values)
    if direction is None:
        return (old != new) & ~jnp.isnan(old) & ~jnp.isnan(new)
    return (old <= 0) & (new > 0) if direction else (old > 0) & (new <= 0)
