"""`jax.lax.scan`, evaluated in parallel over its steps."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from .._scan import check_instance, check_integer
from ._implicit_derivative import stop_gradient
from ._newton import ParallelNewton
from ._policy import AbstractPolicy, ParallelThenSequential
from ._prediction import Prediction
from ._ravel import Ravel
from ._recurrence import Recurrence
from ._solve import solve_recurrence


_Carry = TypeVar("_Carry")


@eqx.filter_jit
def parallel_scan(
    f: Callable[[_Carry, PyTree], tuple[_Carry, PyTree]],
    init: _Carry,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    *,
    root_finder: optx.AbstractRootFinder = ParallelNewton(),
    guess: PyTree | None = None,
    max_steps: int = 64,
    policy: AbstractPolicy = ParallelThenSequential(),
    throw: bool = True,
) -> tuple[_Carry, PyTree]:
    """As `jax.lax.scan(f, init, xs, length, reverse)`, with all steps solved together.

    Instead of `N` steps in sequence, a few iterations are made, each of which evaluates `f` at all steps at once and
    solves a linear recurrence by an associative scan. It pays on a parallel device for long sequences whose state is
    small and whose dynamics forget: RNNs, MCMC chains, filters. Whatever it cannot solve it steps through, so that the
    result is that of `lax.scan` in any case.

    **Arguments:**

    - `f`: maps `(carry, x)` to `(carry, y)`.
    - `init`: the carry before the first step: a pytree of floating-point or complex arrays. What counts or indexes
        belongs in `xs`.
    - `xs`: a pytree of arrays over whose leading axis the scan goes, or `None`.
    - `length`: the number of steps, if `xs` has no arrays.
    - `reverse`: whether to go from the last step to the first.
    - `root_finder`: an Optimistix root finder, by default `parallel_diffrax.ParallelNewton()`. `ELK()` where no good
        guess is known; either with an approximate Jacobian where `D` is large.
    - `guess`: the carries after each step, where something is known about them: of `init`'s structure with a leading
        axis of length `N`, in the order of `xs`. By default `init` at every step.
    - `max_steps`: the largest number of iterations.
    - `fallback`: what to do with the steps that were not solved by then.
    - `throw`: whether to raise when the steps could not be solved. If `False` the outcome may be wrong or not finite, as it
        is where `lax.scan` overflows; outputs that are not floating-point cannot show it.

    **Returns:** the last carry, and the outputs `y` of all steps, stacked: what `lax.scan` returns, to rounding.

    **Raises:** `TypeError` for a carry that is not made of inexact arrays or whose type changes; `ValueError` for lengths
    that disagree; a runtime error if the result is not finite, or not solved under `ParallelOnly`.

    Cost: see the root finder, plus one evaluation of all steps. Derivatives of any order, with exact Jacobians whatever the
    root finder used: by one (reverse) linear scan, at memory `N D^2` for a carry of `D` numbers. Where the root finder's
    Jacobian is approximate and `D` is above 64, by products with the Jacobians instead, at memory `N D`: iterated with in
    parallel, preconditioned by the approximation, or if that does not reach rounding in 64 iterations, in one sequential
    sweep.
    """
    init = jtu.tree_map(jnp.asarray, init)
    check_kinds("parallel_scan", root_finder, policy, max_steps)
    length = check_length(xs, length)
    check_carry(f, init, xs)
    if length == 0 or all(x.size == 0 for x in jtu.tree_leaves(init)):
        return lax.scan(f, init, xs, length=length, reverse=reverse)

    def flip(tree):
        return jtu.tree_map(lambda x: jnp.flip(x, axis=0), tree) if reverse else tree

    guess = flip(check_guess(guess, init, length))
    recurrence, ravel, flat_guess = stack(f, init, flip(jtu.tree_map(jnp.asarray, xs)), length, guess)
    solution = solve_recurrence(
        recurrence,
        GivenGuess(stop_gradient(flat_guess)),
        root_finder=root_finder,
        max_steps=max_steps,
        policy=policy,
        eps=ravel.eps,
    )
    carries = solution.y
    if throw:
        carries = solution.result.error_if(carries, solution.result != optx.RESULTS.successful)

    # The outputs, from one more evaluation of all steps at the solution: NaN where there is no state to start from.
    reached = jnp.all(jnp.isfinite(recurrence.previous(carries)), axis=1)
    previous, inputs = recurrence.guard(carries, reached)

    def output(carry, x, reached):
        ys = f(ravel.unravel(carry), x)[1]
        return jtu.tree_map(lambda y: jnp.where(reached, y, jnp.nan) if eqx.is_inexact_array(y) else y, ys)

    return ravel.unravel(carries[-1]), flip(jax.vmap(output)(previous, inputs, reached))


class GivenGuess(eqx.Module):
    """Guesses what it was given; where a policy begins again later on, it was no good, and the state there is the guess."""

    y: Float[Array, " N D"]

    def __call__(self, segment, start, count, start_level):
        del count
        index = jnp.minimum(jnp.arange(segment.length), self.y.shape[0] - 1)
        y = jnp.where(jnp.asarray(start) == 0, self.y[index], segment.init)
        return Prediction(y, jnp.array(0), jnp.array(segment.length), jnp.asarray(start_level))


def stack(f, init, xs, length, guess) -> tuple[Recurrence, Ravel, Float[Array, " N D"]]:
    """The recurrence of raveled carries that a scan is, and its first guess: by default the first carry at every step."""
    ravel = Ravel(init)

    def step(carry, x):
        return ravel.ravel(f(ravel.unravel(carry), x)[0])

    recurrence = Recurrence.make(step, ravel.ravel(init), xs, length)
    if guess is None:
        return recurrence, ravel, jnp.broadcast_to(recurrence.init, (length, ravel.size))
    return recurrence, ravel, jax.vmap(ravel.ravel)(guess)


def check_kinds(name: str, root_finder, policy, max_steps):
    check_instance(name, "root_finder", root_finder, optx.AbstractRootFinder, "ParallelNewton()")
    check_instance(name, "policy", policy, AbstractPolicy, "ParallelThenSequential()")
    check_integer(name, "max_steps", max_steps, "the largest number of iterations")


def check_length(xs, length) -> int:
    length = int(length) if isinstance(length, np.integer) else length
    check_integer("parallel_scan", "length", length, "the number of steps", least=0, optional=True)
    lengths = {jnp.shape(x)[0] if jnp.ndim(x) > 0 else None for x in jtu.tree_leaves(xs)}
    if length is not None:
        lengths.add(length)
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            "`(f, init, xs, length)` needs one number of steps: give `xs` whose arrays all have the same "
            f"leading axis, or `length`, or both in agreement. Got leading axes and length {sorted(lengths, key=str)}."
        )
    (only,) = lengths
    assert only is not None
    return only


def check_carry(f, init, xs):
    wrong = [x.dtype for x in jtu.tree_leaves(init) if not jnp.issubdtype(x.dtype, jnp.inexact)]
    if wrong or len(jtu.tree_leaves(init)) == 0:
        raise TypeError(
            "`(f, init, ...)`: what is solved for is the carry, so `init` must be a pytree of floating-point or complex "
            f"arrays, at least one; got leaves of dtype {wrong}. Move counters, indices and keys into `xs`."
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
            "`(f, init, ...)`: `f` must return a carry of the same structure, shapes and dtypes as `init`; "
            f"`init` is {want}, the returned carry is {out}."
        )


def check_guess(guess, init, length):
    if guess is None:
        return None
    guess = jtu.tree_map(jnp.asarray, guess)
    want = [(length, *x.shape) for x in jtu.tree_leaves(init)]
    if jtu.tree_structure(guess) != jtu.tree_structure(init) or [g.shape for g in jtu.tree_leaves(guess)] != want:
        raise ValueError(
            "`guess=...` must have the structure of `init` with a leading axis over the steps: "
            f"expected leaves of shapes {want}, got {[g.shape for g in jtu.tree_leaves(guess)]}."
        )
    # A guess may be rough, but it is of the carry's kind.
    return jtu.tree_map(lambda g, x: (g if jnp.iscomplexobj(x) else g.real).astype(x.dtype), guess, init)
