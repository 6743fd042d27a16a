"""`jax.lax.scan`, evaluated in parallel over its steps."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import PyTree

from ._newton import ParallelNewton
from ._policies import AbstractPolicy, ParallelThenSequential
from ._scan_problem import flip, ScanProblem
from ._solve import check_kinds
from ._tangents import nan_unless


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
    """`jax.lax.scan(f, init, xs, length, reverse)`, with all steps solved together.

    Use it on a parallel device for long sequences whose state is small and whose dynamics forget: RNNs, MCMC chains,
    filters. A few iterations replace `N` sequential steps. Each iteration evaluates `f` at all steps at once, and solves a
    linear recurrence by an associative scan. Steps that the iteration does not solve are made sequentially, so that the
    result is that of `lax.scan` in any case.

    **Arguments:**

    - `f`: maps `(carry, x)` to `(carry, y)`.
    - `init`: the carry before the first step: a pytree of floating-point or complex arrays. Counters and indices belong in
        `xs`.
    - `xs`: a pytree of arrays with a leading axis over the `N` steps, or `None`.
    - `length`: the number of steps, if `xs` has no arrays.
    - `reverse`: whether to go from the last step to the first.
    - `root_finder`: an Optimistix root finder, by default `ParallelNewton()`. Use `ELK()` if no good guess is known. Use
        either with an approximate Jacobian if the carry is large.
    - `guess`: a guess of the carries after each step: of `init`'s structure, with a leading axis of length `N`, in the order
        of `xs`. The default is `init` at every step.
    - `max_steps`: the largest number of iterations.
    - `policy`: decides which steps are solved in parallel and which are made sequentially.
    - `throw`: whether to raise if the steps could not be solved. If `False`, the result may then be wrong or not finite, as
        it is not finite if `lax.scan` overflows. Outputs that are not floating-point cannot show it.

    **Returns:** the last carry, and the outputs `y` of all steps, stacked: the result of `lax.scan`, to rounding.

    **Cost:** that of the root finder, and one more evaluation of all steps. Derivatives of any order use exact Jacobians,
    whichever approximation the root finder has: one (reverse) linear scan, memory `N D^2` for a carry of `D` numbers. If the
    root finder's Jacobian is approximate and `D` is above 64, derivatives use products with the Jacobians, memory `N D`: an
    iteration in parallel that the approximation preconditions, or `N` sequential products if it does not reach rounding in
    64 iterations.

    **Raises:** `TypeError` for a carry that is not made of inexact arrays or whose type changes; `ValueError` for lengths
    that disagree and for a guess of other shapes than the carries; a runtime error if the result is not finite, or under
    `ParallelOnly` not solved.
    """
    check_kinds("parallel_scan", root_finder, policy, max_steps)
    problem = ScanProblem.make("parallel_scan", f, init, xs, length, guess, reverse)
    recurrence, ravel = problem.recurrence, problem.ravel
    if problem.length == 0 or ravel.size == 0:
        init = jtu.tree_map(jnp.asarray, init)
        return lax.scan(f, init, xs, length=problem.length, reverse=reverse)

    solution = problem.solve(root_finder, max_steps, policy)
    carries = solution.y
    if throw:
        carries = solution.result.error_if(carries, solution.result != optx.RESULTS.successful)

    # One more evaluation of all steps at the solution gives the outputs: NaN for a step from a state that is not finite.
    reached = jnp.all(jnp.isfinite(recurrence.previous(carries)), axis=1)
    previous, inputs = recurrence.guard(carries, reached)

    def output(carry, x, reached):
        ys = f(ravel.unravel(carry), x)[1]
        return jtu.tree_map(lambda y: nan_unless(reached, y) if eqx.is_inexact_array(y) else y, ys)

    return ravel.unravel(carries[-1]), flip(jax.vmap(output)(previous, inputs, reached), reverse)
