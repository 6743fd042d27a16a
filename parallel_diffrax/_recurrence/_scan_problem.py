"""The recurrence of a `jax.lax.scan`: its arguments, checked and raveled."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from .._scan import check_integer
from ._policies import AbstractPolicy
from ._prediction import Prediction
from ._ravel import Ravel
from ._recurrence import Recurrence
from ._solution import RecurrenceSolution
from ._solve import solve_recurrence
from ._tangents import stop_gradient


class ScanProblem(eqx.Module):
    """The steps of `jax.lax.scan(f, init, xs, length, reverse)`, in the order of the scan, as a recurrence of raveled
    carries, with a guess of them."""

    recurrence: Recurrence
    ravel: Ravel = eqx.field(static=True)
    guess: Float[Array, " N D"]
    length: int = eqx.field(static=True)

    @classmethod
    def make(
        cls, call: str, f: Callable, init: PyTree, xs: PyTree, length: int | None, guess: PyTree | None, reverse=False
    ) -> "ScanProblem":
        """Checks the arguments of a scan, which are those of `parallel_scan`. `call` names the function that the user
        called."""
        init = jtu.tree_map(jnp.asarray, init)
        length = _check_length(call, xs, length)
        _check_carry(call, f, init, xs)
        guess = flip(_check_guess(call, guess, init, length), reverse)
        inputs = flip(jtu.tree_map(jnp.asarray, xs), reverse)
        ravel = Ravel(init)
        step = lambda carry, x: ravel.ravel(f(ravel.unravel(carry), x)[0])
        # A scan of no steps has no first input to convert the closure with, and no derivative.
        make = Recurrence.make if length > 0 else Recurrence
        recurrence = make(step, ravel.ravel(init), inputs, length)
        constant = jnp.broadcast_to(recurrence.init, (length, ravel.size))
        return cls(recurrence, ravel, constant if guess is None else jax.vmap(ravel.ravel)(guess), length)

    def solve(self, root_finder: optx.AbstractRootFinder, max_steps: int, policy: AbstractPolicy) -> RecurrenceSolution:
        """Solves the recurrence from the guess."""
        guess = GivenGuess(stop_gradient(self.guess))
        return solve_recurrence(self.recurrence, guess, root_finder, max_steps, policy, self.ravel.eps)


def flip(tree: PyTree, reverse: bool) -> PyTree:
    """`tree` with the leading axis of its arrays reversed, if `reverse`."""
    return jtu.tree_map(lambda x: jnp.flip(x, axis=0), tree) if reverse else tree


class GivenGuess(eqx.Module):
    """Predicts the given states for the first attempt. For a later segment, where they failed, it predicts the state before
    the segment."""

    y: Float[Array, " N D"]

    def __call__(self, segment, start, count, start_level):
        del count
        index = jnp.minimum(jnp.arange(segment.length), self.y.shape[0] - 1)
        y = jnp.where(jnp.asarray(start) == 0, self.y[index], segment.init[None])
        return Prediction(y, jnp.array(0), jnp.array(segment.length), jnp.asarray(start_level))


def _check_length(call, xs, length) -> int:
    length = int(length) if isinstance(length, np.integer) else length
    check_integer(call, "length", length, "the number of steps", least=0, optional=True)
    lengths = {jnp.shape(x)[0] if jnp.ndim(x) > 0 else None for x in jtu.tree_leaves(xs)}
    lengths |= set() if length is None else {length}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"`{call}(f, init, xs, length)` needs one number of steps: give `xs` whose arrays all have the same "
            f"leading axis, or `length`, or both in agreement. Got leading axes and length {sorted(lengths, key=str)}."
        )
    (only,) = lengths
    assert only is not None
    return only


def _check_carry(call, f, init, xs):
    wrong = [x.dtype for x in jtu.tree_leaves(init) if not jnp.issubdtype(x.dtype, jnp.inexact)]
    if wrong or len(jtu.tree_leaves(init)) == 0:
        raise TypeError(
            f"`{call}(f, init, ...)` solves for the carry: `init` must be a pytree of floating-point or complex arrays, at "
            f"least one. Got leaves of dtype {wrong}. Move counters, indices and keys into `xs`."
        )
    first = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), xs)
    out = jax.eval_shape(lambda c, x: f(c, x)[0], init, first)
    want = jax.eval_shape(lambda: init)
    same = jtu.tree_structure(out) == jtu.tree_structure(want)
    same = same and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(jtu.tree_leaves(out), jtu.tree_leaves(want))
    )
    if not same:
        raise TypeError(
            f"`{call}(f, init, ...)`: `f` must return a carry of the same structure, shapes and dtypes as `init`. "
            f"`init` is {want}, the returned carry is {out}."
        )


def _check_guess(call, guess, init, length):
    if guess is None:
        return None
    guess = jtu.tree_map(jnp.asarray, guess)
    want = [(length, *x.shape) for x in jtu.tree_leaves(init)]
    if jtu.tree_structure(guess) != jtu.tree_structure(init) or [g.shape for g in jtu.tree_leaves(guess)] != want:
        raise ValueError(
            f"`{call}(guess=...)`: the guess must have the structure of `init` with a leading axis over the steps. "
            f"Expected leaves of shapes {want}, got {[g.shape for g in jtu.tree_leaves(guess)]}."
        )
    # A guess may be inaccurate, but takes the dtypes of the carry.
    return jtu.tree_map(lambda g, x: (g if jnp.iscomplexobj(x) else g.real).astype(x.dtype), guess, init)
