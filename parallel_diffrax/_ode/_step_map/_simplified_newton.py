"""Approximate implicit steps for first guesses: a fixed number of operations, no loops, no pivoting."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._scan import eliminate
from ._base import compiled_apart
from ._stage_equations import StageEquations, weighted_sum


# The number of simplified Newton iterations on each stage.
_ITERATIONS = 3
# Larger matrices are inverted in a loop: unrolled, they take too many operations.
_LARGEST_UNROLLED_SIZE = 8


def simplified_newton_step(
    equations: StageEquations, y0: Float[Array, " D"], slope: Float[Array, " D"] | None, x
) -> tuple[Float[Array, " D"], Float[Array, " D"], Float[Array, " D"]]:
    """An approximate step of a method with an explicit first stage and the same `a_ii` in all other stages. `slope` and the
    returned values are as in `AbstractEmbeddedSolver.trial`.

    Each stage takes three simplified Newton iterations, with `J = h f_y` at `y0`:

        z <- z + (I - a_ii J)^{-1} (p + a_ii h f(y0 + z) - z).

    The error estimate includes the last change of each stage, so step sizes that follow it are small enough for the stages
    to converge. On a GPU such a step is one kernel; one that iterates to convergence is a hundred.
    """
    scheme, size = equations.scheme, y0.shape[0]
    h = (jnp.asarray(x[1]) - jnp.asarray(x[0])).astype(y0.dtype)
    gamma = float(scheme.diagonal[-1])
    identity = jnp.eye(size, dtype=y0.dtype)

    def field(i, y):
        return compiled_apart(equations.evaluate(equations.field, scheme.c[i], x, y))

    def column(direction):
        return jax.jvp(lambda y: field(0, y), (y0,), (direction,))[1]

    if size <= _LARGEST_UNROLLED_SIZE:
        jacobian = jnp.stack([column(direction) for direction in identity], axis=1)
        inverse = _inverse(identity - gamma * jacobian)
    else:
        inverse = eliminate(identity - gamma * jax.vmap(column, out_axes=1)(identity), identity)

    k, l, offset, last_change = [], [], y0, jnp.zeros_like(y0)
    for i in range(scheme.num_stages):
        offset = weighted_sum(jnp.zeros_like(y0), (scheme.a[i, :i], k), (scheme.e[i, :i], l))
        if i == 0:
            # The slope from the end of the previous step belongs to the slow solution; the field there need not.
            k.append(field(0, y0) if slope is None or scheme.multiple else h * slope)
        else:
            z, change = offset + gamma * k[-1], jnp.zeros_like(y0)
            for _ in range(_ITERATIONS):
                change = inverse @ (offset + gamma * field(i, y0 + z) - z)
                z = z + change
            last_change = last_change + jnp.abs(change)
            k.append((z - offset) / gamma)
            offset = z
        if equations.explicit_field is not None:
            l.append(compiled_apart(equations.evaluate(equations.explicit_field, scheme.explicit_c[i], x, y0 + offset)))
    w = offset[None]
    error = jnp.abs(weighted_sum(jnp.zeros_like(y0), (scheme.b_error, k), (scheme.f_error, l))) + last_change
    end = k[-1] + l[-1] if scheme.multiple else k[-1]
    return y0 + equations.increment(w, k, l), error, end / h


def _inverse(matrix: Float[Array, " D D"]) -> Float[Array, " D D"]:
    # Elimination without pivoting. If it is inaccurate, the iterations do not converge and the error estimate is large.
    size = matrix.shape[0]
    rows = [jnp.concatenate([matrix[i], jnp.eye(size, dtype=matrix.dtype)[i]]) for i in range(size)]
    for k in range(size):
        rows[k] = rows[k] / rows[k][k]
        for i in range(size):
            if i != k:
                rows[i] = rows[i] - rows[i][k] * rows[k]
    return jnp.stack([row[size:] for row in rows])
