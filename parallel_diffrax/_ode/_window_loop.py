"""A loop over windows with derivatives in forward and reverse mode, which solves no window twice."""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._kernels import any_member
from .._recurrence import SOLUTION
from ._compat import not_reversible


_State = TypeVar("_State")

# The largest length of each of the nested loops over windows. Nesting skips unused windows in groups.
_LONGEST_LOOP = 16


def repeat_windows(unfinished: Callable, body: Callable, init: _State, max_steps: int | None) -> _State:
    """`while unfinished(state): state = body(state, True)`, at most `max_steps` times.

    `body` receives the value of `unfinished`. In a batch it is called until the last member is finished, and its result is
    discarded for members that are already finished.

    Reverse mode needs a bound on the number of windows. With `max_steps=1` there is no loop, and the backward pass has all
    that it needs in memory. In a longer loop the solution of each window is stored: `N D` numbers for each of the
    `max_steps` windows, and `N D^2` for one. The backward pass computes the rest again without iterations, by one evaluation
    of all steps. Unused windows cost `max_steps^(1/k)` skipped branches on each of `k` levels of loops.
    """
    init = jtu.tree_map(_as_array, init)
    if max_steps is None:
        final = lax.while_loop(unfinished, lambda state: _advance(unfinished, body, state), init)
        return not_reversible(
            final,
            "`diffeqsolve(..., max_steps=None, adjoint=ParallelAdjoint())` cannot be differentiated in reverse mode, "
            "which must allocate memory for every window. Set `max_steps` to the number of windows.",
        )

    def unless_finished(step):
        """`step` if any member of the batch has another window. It maps the number of windows so far and the state."""

        def run(carry):
            count, state = carry
            return lax.cond(any_member(unfinished(state) & (count < max_steps)), step, lambda carry: carry, carry)

        # Around the branch, not inside it: a branch stores its constants once for each window.
        policy = jax.checkpoint_policies.save_only_these_names(SOLUTION)
        return jax.checkpoint(run, policy=policy, prevent_cse=False) if max_steps > 1 else run

    def step(carry):
        count, state = carry
        return count + 1, _advance(lambda state: unfinished(state) & (count < max_steps), body, state)

    def repeat(run, length):
        return lambda carry: lax.scan(lambda carry, _: (run(carry), None), carry, length=length)[0]

    run = unless_finished(step)
    for length in _levels(max_steps):
        run = unless_finished(repeat(run, length))
    return run((jnp.array(0), init))[1]


def _advance(unfinished, body, state):
    wanted = unfinished(state)
    after = body(state, wanted)
    return jtu.tree_map(lambda new, old: jnp.where(wanted, _like(new, old), old), after, state)


def _levels(max_steps: int) -> list[int]:
    """Lengths of nested loops that make at least `max_steps` steps together, all equal."""
    if max_steps <= 1:
        return []
    depth = max(1, math.ceil(math.log(max_steps, _LONGEST_LOOP) - 1e-9))
    length = math.ceil(max_steps ** (1 / depth) - 1e-9)
    return [length] * depth


def _as_array(x):
    x = jnp.asarray(x)
    # Remove the weak type of a Python number: the types of a loop may not change.
    return lax.convert_element_type(x, x.dtype)


def _like(new, old):
    new = jnp.asarray(new)
    if new.dtype != old.dtype or new.shape != old.shape:
        raise ValueError(
            f"`diffeqsolve(..., adjoint=ParallelAdjoint())`: a window changed an array of type {old.dtype}{old.shape} in "
            f"the loop's state to {new.dtype}{new.shape}. The step-size controller and the progress meter must keep the "
            "types of their states."
        )
    return new
