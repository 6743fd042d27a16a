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
    """The first fine step of a window in which an event occurs.

    **Attributes:**

    - `found`: whether an event occurs.
    - `step`: the index of the fine step; the last index if no event occurs.
    - `mask`: the condition function that triggers, as a pytree of booleans of which at most one is true. If several trigger
        in the same fine step, the first in the pytree counts, as in Diffrax.
    - `undefined`: whether a condition function is NaN before any event.
    """

    found: Bool[Array, ""]
    step: Int[Array, ""]
    mask: PyTree[Bool[Array, ""]]
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
    """Evaluates every condition at the ends of all fine steps at once, and finds the first event.

    Events follow Diffrax's definition, applied to fine steps. A boolean condition triggers if it is true at the end of a
    step. A float triggers if its sign changes over the step (`direction=None`), if it becomes positive (`True`), or if it
    stops being positive (`False`). NaN is not a change of sign. Events are sought only before the first step that is not
    `solved`.

    **Arguments:**

    - `cond_fn`, `direction`: those of a `diffrax.Event`.
    - `before`, `after`: the values of the condition functions before and after the window; unused for booleans.
    - `window`: the dense output.
    - `args`, `kwargs`: the arguments of the condition functions.

    **Returns:** a `Crossing`, without derivatives.

    **Cost:** `N` evaluations of each condition function, in parallel.
    """
    window, args, kwargs, before, after = stop_gradient((window, args, kwargs, before, after))
    steps = window.steps
    num_steps = steps.solved.shape[0]
    ends = steps.ts[1:]
    ys = jax.vmap(window.evaluate)(ends)
    solved = jnp.arange(num_steps) < num_leading_true(steps.solved)

    def events_of(cond_fn, direction, before, after):
        values = jax.vmap(lambda t, y: cond_fn(t, y, args, **kwargs))(ends, ys)
        if values.dtype == bool:
            return solved & values, jnp.zeros_like(solved)
        # Diffrax itself evaluated the condition at the end of the window.
        values = with_row(values, -1, after)
        previous = preceded_by(before, values)
        return solved & _changes(previous, values, direction), solved & jnp.isnan(values)

    found = jtu.tree_map(events_of, cond_fn, direction, before, after, is_leaf=callable)
    structure = jtu.tree_structure(cond_fn, is_leaf=callable)
    pairs = structure.flatten_up_to(found)
    events, undefined = (jnp.stack([pair[k] for pair in pairs]) for k in range(2))
    step = num_leading_true(~jnp.any(events, axis=0))
    first_nan = num_leading_true(~jnp.any(undefined, axis=0))
    found = (step < num_steps) & (step <= first_nan)
    step = jnp.minimum(step, num_steps - 1)
    at_step = events[:, step] & found
    first = at_step & (jnp.cumsum(at_step) == 1)
    return Crossing(found, step, structure.unflatten(list(first)), (first_nan < num_steps) & ~found)


def _changes(previous: Float[Array, " N"], values: Float[Array, " N"], direction: bool | None) -> Bool[Array, " N"]:
    old, new = jnp.sign(previous), jnp.sign(values)
    if direction is None:
        return (old != new) & ~jnp.isnan(old) & ~jnp.isnan(new)
    return (old <= 0) & (new > 0) if direction else (old > 0) & (new <= 0)
