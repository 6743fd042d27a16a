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
    """Solves `L d = r`, or the transposed system in reverse mode, by products with the exact Jacobians alone.

    It iterates `d <- d + L~^{-1} (r - L d)`, where `L~` has the approximate transitions with which the solution was found.
    The iteration converges wherever the solve did, at the same rate. If it does not reach rounding in 64 iterations, `N`
    products are made sequentially instead.

    **Arguments:**

    - `step`, `previous`, `inputs`: the step, and its arguments for all steps. Differentiable, to any order.
    - `transitions`: the approximate transitions.
    - `finite`: the steps that depend on the one before. The others are treated as independent of it.
    - `r`: the right-hand side, shape `(N, D)`.
    - `scan`: solves the systems with `L~`.

    **Returns:** `d`, shape `(N, D)`.

    **Cost:** a product with all Jacobians and a scan per iteration. Memory: a few `N D`, and `N` times what the product of
    one step stores.
    """

    def products(d, previous, inputs):
        before = shift(d)
        tangents = jax.vmap(lambda y, x, v: jax.jvp(lambda y: step(y, x), (y,), (v,))[1])(previous, inputs, before)
        return jnp.where(finite[:, None], tangents, 0)

    # Only the products are differentiated, not the solvers.
    constant = jax.tree.map(lax.stop_gradient, (previous, inputs, transitions))

    def solve(matvec, b):
        return _iterate(
            matvec, b, lambda res: scan.solve(constant[2], res), lambda: _forwards(step, constant, finite, b)
        )

    def transpose_solve(vecmat, b):
        return _iterate(
            vecmat,
            b,
            lambda res: scan.solve(constant[2], res, transpose=True),
            lambda: _backwards(step, constant, finite, b),
        )

    return lax.custom_linear_solve(
        lambda d: d - products(d, previous, inputs), r, solve=solve, transpose_solve=transpose_solve
    )


def _iterate(matvec, b, precondition, otherwise):
    """Preconditioned Richardson iteration down to rounding. If it does not converge, the result of `otherwise`."""
    eps = float(jnp.finfo(b.dtype).eps)

    def keep_going(carry):
        _, k, converged = carry
        return (k < _MAX_ITERATIONS) & ~converged

    def body(carry):
        d, k, _ = carry
        update = precondition(b - matvec(d))
        d = d + update
        # Written so that NaN does not converge.
        converged = jnp.all(jnp.abs(update) <= 16 * eps * jnp.max(jnp.abs(d)))
        return d, k + 1, converged

    d, _, converged = lax.while_loop(keep_going, body, (jnp.zeros_like(b), 0, jnp.array(False)))
    return lax.cond(converged & jnp.all(jnp.isfinite(d)), lambda: d, otherwise)


def _forwards(step, constant, finite, b):
    """`d[i] = A[i] d[i-1] + b[i]`, sequentially."""

    def body(d, element):
        y, x, finite, b = element
        tangent = jax.jvp(lambda y: step(y, x), (y,), (d,))[1]
        d = jnp.where(finite, tangent, 0) + b
        return d, d

    return lax.scan(body, jnp.zeros_like(b[0]), (*constant[:2], finite, b))[1]


def _backwards(step, constant, finite, b):
    """`w[i] = A[i+1]^T w[i+1] + b[i]`, sequentially from the end."""

    def body(carried, element):
        y, x, finite, b = element
        w = carried + b
        (cotangent,) = jax.vjp(lambda y: step(y, x), y)[1](w)
        return jnp.where(finite, cotangent, 0), w

    return lax.scan(body, jnp.zeros_like(b[0]), (*constant[:2], finite, b), reverse=True)[1]
