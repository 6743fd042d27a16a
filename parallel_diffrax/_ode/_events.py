"""The first event in a window, among the ends of all its fine steps."""

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

    - `found`: whether there is one.
    - `step`: its index; the last, if there is none.
    - `mask`: which condition function it is, a pytree of booleans, at most one of them true: of several in one fine step the
        first in the pytree, as in Diffrax.
    - `undefined`: whether a condition function became NaN before any event.
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

    What an event is, is Diffrax's definition with fine steps: a boolean that is true at the end of one; a float whose sign
    there is another than at its beginning (`direction=None`), has become positive (`True`), or has ceased to be positive
    (`False`). Steps that are not sound have no events, nor has what comes after them; and NaN is no change of sign.

    **Arguments:**

    - `cond_fn`, `direction`: of a `diffrax.Event`.
    - `before`, `after`: the values of the condition functions before the window and after it; of booleans, whatever.
    - `window`: its solution.
    - `args`, `kwargs`: for the condition functions.

    **Returns:** a `Crossing`, without derivatives. Cost: `N` evaluations of each condition function, in parallel.
    """
    window, args, kwargs, before, after = stop_gradient((window, args, kwargs, before, after))
    num_steps = window.solved.shape[0]
    ends = window.ts[1:]
    ys = jax.vmap(window.evaluate)(ends)
    solved = jnp.arange(num_steps) < num_leading_true(window.solved)

    def look(cond_fn, direction, before, after):
        values = jax.vmap(lambda t, y: cond_fn(t, y, args, **kwargs))(ends, ys)
        if values.dtype == bool:
            return solved & values, jnp.zeros_like(solved)
        # After the window, Diffrax has evaluated it itself.
        values = with_row(values, -1, after)
        earlier = preceded_by(before, values)
        return solved & _changes(earlier, values, direction), solved & jnp.isnan(values)

    looked = jtu.tree_map(look, cond_fn, direction, before, after, is_leaf=callable)
    structure = jtu.tree_structure(cond_fn, is_leaf=callable)
    pairs = structure.flatten_up_to(looked)
    events, undefined = (jnp.stack([pair[k] for pair in pairs]) for k in range(2))
    step = num_leading_true(~jnp.any(events, axis=0))
    unknown = num_leading_true(~jnp.any(undefined, axis=0))
    found = (step < num_steps) & (step <= unknown)
    step = jnp.minimum(step, num_steps - 1)
    at_step = events[:, step] & found
    first = at_step & (jnp.cumsum(at_step) == 1)
    return Crossing(found, step, structure.unflatten(list(first)), (unknown < num_steps) & ~found)


def _changes(earlier: Float[Array, " N"], values: Float[Array, " N"], direction: bool | None) -> Bool[Array, " N"]:
    old, new = jnp.sign(earlier), jnp.sign(values)
    if direction is None:
        return (old != new) & ~jnp.isnan(old) & ~jnp.isnan(new)
    return (old <= 0) & (new > 0) if direction else (old > 0) & (new <= 0)
