"""How a root finder converges on a recurrence, compared with the rate that theory predicts."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._scan import check_instance, check_integer, shift
from ._newton import ParallelNewton
from ._recurrence import Recurrence
from ._root_finder import AbstractParallelRootFinder, SolveRequest
from ._scan_problem import ScanProblem
from ._stepper import step_through_vectors


_Carry = TypeVar("_Carry")

# Iterations of the power method for the spectral norm.
_POWER_ITERATIONS = 40


class ConvergenceHistory(eqx.Module):
    """The convergence of `K` iterations on `N` steps, as `convergence_history` returns it.

    **Attributes:**

    - `residual`, `error`: the Euclidean norms of each step's residual, and of each state's error against the sequential
        answer, before every iteration and after the last, shapes `(K + 1, N)`.
    - `measured_rate`: the ratio of the norms of the total error after and before every iteration, shape `(K,)`. NaN where
        the error was zero.
    - `predicted_rate`: the ratio that `M = L~^{-1} (L~ - L)` at the solution predicts for the error before every iteration,
        shape `(K,)`. Zero for exact Jacobians, whose convergence is quadratic.
    - `rate_bound`: the spectral norm of `M`, which bounds `predicted_rate`.
    """

    residual: Float[Array, " K1 N"]
    error: Float[Array, " K1 N"]
    measured_rate: Float[Array, " K"]
    predicted_rate: Float[Array, " K"]
    rate_bound: Float[Array, ""]


@eqx.filter_jit
def convergence_history(
    f: Callable[[_Carry, PyTree], tuple[_Carry, PyTree]],
    init: _Carry,
    xs: PyTree = None,
    length: int | None = None,
    *,
    root_finder: AbstractParallelRootFinder = ParallelNewton(),
    guess: PyTree | None = None,
    num_iterations: int = 32,
) -> ConvergenceHistory:
    """Makes a given number of iterations of a root finder, and records how each step converges.

    Use it to choose a method, or to see why one is slow. Near the solution, an iteration of `ParallelNewton` with
    transitions `A~` in place of the Jacobians `A` multiplies the error `e` by `M = L~^{-1} (L~ - L)`:

        (M e)[i] = A~[i] (M e)[i-1] + (A[i] - A~[i]) e[i-1].

    The norm of `M` bounds the rate of linear convergence, and `|M e| / |e|` predicts it for the error `e` at hand. (`M` is
    nilpotent: after `N` iterations the error is zero.) `M` does not include damping.

    **Arguments:**

    - `f`, `init`, `xs`, `length`, `guess`: as for `parallel_scan`.
    - `root_finder`: `ParallelNewton(...)` or `ELK(...)`.
    - `num_iterations`: `K`. Iterations continue after convergence.

    **Returns:** a `ConvergenceHistory`.

    **Cost:** the sequential answer, `K` iterations, and 80 products with `M` or its transpose for its norm, by power
    iteration.

    **Raises:** like `parallel_scan`, and `TypeError` for a root finder from outside this package.

    ??? cite "Reference"

        Gonzalez, "Parallel Newton methods", arXiv 2603.16850 (2026).
    """
    call = "convergence_history"
    check_instance(call, "root_finder", root_finder, AbstractParallelRootFinder, "ParallelNewton()")
    check_integer(call, "num_iterations", num_iterations, "the number of iterations")
    problem = ScanProblem.make(call, f, init, xs, length, guess)
    recurrence, y = problem.recurrence, problem.guess
    solution = step_through_vectors(recurrence.step, recurrence.init, recurrence.inputs, problem.length)
    fn = lambda y, _: (recurrence.residual(y), None)
    options = {"request": SolveRequest(eps=problem.ravel.eps)}
    state = root_finder.init(fn, y, None, options, jax.eval_shape(lambda: y), None, frozenset())

    def iterate(carry, _):
        y, state = carry
        new_y, state, _ = root_finder.step(fn, y, None, options, state, frozenset())
        return (new_y, state), y

    (last, _), ys = lax.scan(iterate, (y, state), None, length=num_iterations)
    ys = jnp.concatenate([ys, last[None]])
    residual = jnp.linalg.norm(lax.map(recurrence.residual, ys), axis=2)
    errors = ys - solution[None]
    error = jnp.linalg.norm(errors, axis=2)
    total = jnp.linalg.norm(error, axis=1)
    if root_finder.jacobian.exact:
        predicted, bound = jnp.zeros_like(total[1:]), jnp.zeros_like(total[0])
    else:
        multiply, transposed = _error_propagation(recurrence, solution, root_finder)
        predicted = jnp.linalg.norm(lax.map(multiply, errors[:-1]), axis=(1, 2)) / total[:-1]
        bound = _spectral_norm(multiply, transposed, solution)
    return ConvergenceHistory(residual, error, total[1:] / total[:-1], predicted, bound)


def _error_propagation(recurrence: Recurrence, y: Float[Array, " N D"], root_finder: AbstractParallelRootFinder):
    """Products with `M` and with its transpose."""
    _, transitions, _ = root_finder.jacobian.linearise(lambda y: (recurrence.residual(y), None), y)
    _, tangent = jax.linearize(recurrence.residual, y)
    # `J = -L`, so `(A - A~) e[i-1]` is `J e + e - A~ e[i-1]`.
    difference = lambda e: tangent(e) + e - transitions.apply(shift(e))
    transposed = jax.linear_transpose(difference, y)
    return (
        lambda e: root_finder.scan.solve(transitions, difference(e)),
        lambda w: transposed(root_finder.scan.solve(transitions, w, transpose=True))[0],
    )


def _spectral_norm(multiply, transposed, like: Float[Array, " N D"]) -> Float[Array, ""]:
    """The spectral norm of `M`, by power iteration on `M^T M`."""

    def body(carry, _):
        e, _ = carry
        e = transposed(multiply(e))
        norm = jnp.linalg.norm(e)
        return (e / jnp.where(norm > 0, norm, 1), norm), None

    start = jax.random.normal(jax.random.key(0), like.shape, like.dtype)
    start = (start / jnp.linalg.norm(start), jnp.zeros((), like.dtype))
    (_, squared), _ = lax.scan(body, start, None, _POWER_ITERATIONS)
    return jnp.sqrt(squared)
