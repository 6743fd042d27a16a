"""A loop over windows that can be differentiated in both directions without making any window again."""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._recurrence import SOLUTION
from ._compat import not_reversible, unvmap_any


_State = TypeVar("_State")

# Windows are counted by nested loops of at most so many each, so that those which are not needed are skipped together.
_WIDEST_LOOP = 16


def repeat_windows(going: Callable, window: Callable, init: _State, max_steps: int | None) -> _State:
    """`while going(state): state = window(state, ...)`, at most `max_steps` times.

    Reverse mode needs to know how many windows there may be. A loop of one is no loop: everything that the backward pass
    needs is kept. In a longer one the solution of each window is, and what follows from that without iterations is computed
    again: one evaluation of all its steps.

    **Arguments:**

    - `going`: whether there is another window to solve.
    - `window`: from a state, and whether `going` says so for it, to the next state. In a batch it is called until the last
        member is done; what it returns for those that are done already is discarded.
    - `init`: a pytree of arrays and numbers.
    - `max_steps`: the largest number of windows; with `None`, there is no reverse mode.

    **Returns:** the state after the last window.

    Cost: `max_steps^(1/k)` skipped branches for each of `k` levels. Memory of the backward pass for more than one window:
    `N D` numbers for each of the `max_steps` windows, and `N D^2` for one.
    """
    init = jtu.tree_map(_as_array, init)
    if max_steps is None:
        final = lax.while_loop(going, lambda state: _advance(going, window, state), init)
        return not_reversible(
            final,
            "`diffeqsolve(..., max_steps=None, adjoint=ParallelAdjoint())` cannot be differentiated in reverse mode, for "
            "which memory must be set aside for every window. Set `max_steps` to the number of windows.",
        )

    def unless_done(step):
        """`step` on a state and the number of windows so far, where any member of the batch has another."""

        def run(carry):
            count, state = carry
            return lax.cond(unvmap_any(going(state) & (count < max_steps)), step, lambda carry: carry, carry)

        # Around the branch and not inside: what a branch keeps is kept once for each window, even if it never changes.
        return _keep_solutions(run) if max_steps > 1 else run

    def step(carry):
        count, state = carry
        allowed = count < max_steps
        return count + 1, _advance(lambda state: going(state) & allowed, window, state)

    run = unless_done(step)
    for length in _levels(max_steps):
        run = unless_done(_repeat(run, length))
    return run((jnp.array(0), init))[1]


def _keep_solutions(run):
    policy = jax.checkpoint_policies.save_only_these_names(SOLUTION)
    return jax.checkpoint(run, policy=policy, prevent_cse=False)


def _repeat(run, length):
    return lambda carry: lax.scan(lambda carry, _: (run(carry), None), carry, length=length)[0]


def _advance(going, window, state):
    wanted = going(state)
    after = window(state, wanted)
    return jtu.tree_map(lambda new, old: jnp.where(wanted, _like(new, old), old), after, state)


def _levels(max_steps: int) -> list[int]:
    """Lengths of nested loops that make at least so many steps together: as equal as may be."""
    if max_steps <= 1:
        return []
    depth = max(1, math.ceil(math.log(max_steps, _WIDEST_LOOP) - 1e-9))
    length = math.ceil(max_steps ** (1 / depth) - 1e-9)
    return [length] * depth


def _as_array(x):
    x = jnp.asarray(x)
    # Not weakly typed, as Python numbers are: a loop's types may not change.
    return lax.convert_element_type(x, x.dtype)


def _like(new, old):
    new = jnp.asarray(new)
    if new.dtype != old.dtype or new.shape != old.shape:
        raise ValueError(
            f"`diffeqsolve(..., adjoint=ParallelAdjoint())`: a window turned something of type {old.dtype}{old.shape} into "
            f"{new.dtype}{new.shape}. Does the step-size controller or the progress meter keep the types of its state?"
        )
    return new
