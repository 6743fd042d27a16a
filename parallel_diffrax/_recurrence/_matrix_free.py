"""The linear systems of derivatives, for states whose dense Jacobians would need too much memory."""

from collections.abc import Callable

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .._scan import AbstractScan, AbstractTransitions, shift


# Beyond this, the system is solved sequentially.
_MAX_ITERATIONS = 64


def solve_matrix_free(
    step: Callable[[Float[Array, " D"], PyTree], Float[Array, " D"]],
    previous: Float[Array, " N D"],
    inputs: PyTree,
    transitions: AbstractTransitions,
    finite: Bool[Array, " N"],
    r: Float[Array, " N D"],
    scan: AbstractScan,
) -> Float[Array, " N D"]:
    """Solves `L d = r`, or the transposed system in reverse mode, by products with the exact Jacobians alone. `step` with
    its arguments `previous` and `inputs` is differentiated to any order. Steps that are not `finite` do not depend on the
    one before.

    It iterates `d <- d + L~^{-1} (r - L d)`, where `L~` has the approximate `transitions` with which the solution was found.
    The iteration converges wherever the solve did, at the same rate. If it does not reach rounding in 64 iterations, `N`
    products are made sequentially instead. Memory is a few `N D`, and `N` times what the product of one step stores.
    """

    def matrix_vector(d):
        product = lambda y, x, v: jax.jvp(lambda y: step(y, x), (y,), (v,))[1]
        return d - jnp.where(finite[:, None], jax.vmap(product)(previous, inputs, shift(d)), 0)

    # Only the products are differentiated, not the solvers.
    *arguments, transitions = jax.tree.map(lax.stop_gradient, (previous, inputs, transitions))

    def solver(transpose):
        sequential = _backwards if transpose else _forwards
        precondition = lambda res: scan.solve(transitions, res, transpose=transpose)
        return lambda matvec, b: _iterate(
            matvec, b, precondition, lambda: sequential(step, (*arguments, finite, b), jnp.zeros_like(b[0]))
        )

    return lax.custom_linear_solve(matrix_vector, r, solve=solver(False), transpose_solve=solver(True))


def _iterate(matvec, b, precondition, otherwise):
    """Preconditioned Richardson iteration down to rounding. If it does not converge, the result of `otherwise`."""
    eps = float(jnp.finfo(b.dtype).eps)
    keep_going = lambda carry: (carry[1] < _MAX_ITERATIONS) & ~carry[2]

    def body(carry):
        d, k, _ = carry
        update = precondition(b - matvec(d))
        d = d + update
        # Written so that NaN does not converge.
        converged = jnp.all(jnp.abs(update) <= 16 * eps * jnp.max(jnp.abs(d)))
        return d, k + 1, converged

    d, _, converged = lax.while_loop(keep_going, body, (jnp.zeros_like(b), 0, jnp.array(False)))
    return lax.cond(converged & jnp.all(jnp.isfinite(d)), lambda: d, otherwise)


def _forwards(step, elements, zero):
    """`d[i] = A[i] d[i-1] + b[i]`, sequentially."""

    def body(d, element):
        y, x, finite, b = element
        tangent = jax.jvp(lambda y: step(y, x), (y,), (d,))[1]
        d = jnp.where(finite, tangent, 0) + b
        return d, d

    return lax.scan(body, zero, elements)[1]


def _backwards(step, elements, zero):
    """`w[i] = A[i+1]^T w[i+1] + b[i]`, sequentially from the end."""

    def body(carried, element):
        y, x, finite, b = element
        w = carried + b
        (cotangent,) = jax.vjp(lambda y: step(y, x), y)[1](w)
        return jnp.where(finite, cotangent, 0), w

    return lax.scan(body, zero, elements, reverse=True)[1]
