"""Implicit steps for first guesses: a fixed number of operations, no loops, no search for pivots."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._scan import eliminate
from ._stage_equations import Equations, weighted_sum


# Iterations on each stage, all with one Jacobian.
_ITERATIONS = 3
# Larger matrices are inverted in a loop: too many operations to write out.
_LARGEST_UNROLLED_SIZE = 8


def simplified_newton_step(
    equations: Equations, y0: Float[Array, " D"], slope: Float[Array, " D"] | None, x
) -> tuple[Float[Array, " D"], Float[Array, " D"], Float[Array, " D"]]:
    """About one step of a method with an explicit first stage and one `a_ii` in all others, from `y0`, where the derivative
    of the solution is `slope`, if that is known.

    Each stage is iterated on three times, `z <- z + (I - a_ii J)^{-1} (p + a_ii h f(y0 + z) - z)`, with the Jacobian at
    `y0`. What the last iterations changed is part of the error estimate, so that whoever chooses step sizes by it sees to
    it that the stages converge. On a GPU such a step is one kernel, where one that iterates to the end is a hundred.

    **Returns:** the state at the end, the error estimate, the derivative of the solution there. Not finite, or with
    a large error estimate, where a step is too long.
    """
    scheme, size = equations.scheme, y0.shape[0]
    h = (jnp.asarray(x[1]) - jnp.asarray(x[0])).astype(y0.dtype)
    gamma = float(scheme.diagonal[-1])
    identity = jnp.eye(size, dtype=y0.dtype)

    def field(i, y):
        return equations.evaluate(equations.field, scheme.c[i], x, y)

    def column(direction):
        return jax.jvp(lambda y: field(0, y), (y0,), (direction,))[1]

    if size <= _LARGEST_UNROLLED_SIZE:
        jacobian = jnp.stack([column(direction) for direction in identity], axis=1)
        inverse = _inverse(identity - gamma * jacobian)
    else:
        inverse = eliminate(identity - gamma * jax.vmap(column, out_axes=1)(identity), identity)

    k, l, offset, unsolved = [], [], y0, jnp.zeros_like(y0)
    for i in range(scheme.num_stages):
        offset = weighted_sum(jnp.zeros_like(y0), (scheme.a[i, :i], k), (scheme.e[i, :i], l))
        if i == 0:
            # The slope at the end of the step before lies on the slow solution; the field there need not.
            k.append(field(0, y0) if slope is None or scheme.multiple else h * slope)
        else:
            z, change = offset + gamma * k[-1], jnp.zeros_like(y0)
            for _ in range(_ITERATIONS):
                change = inverse @ (offset + gamma * field(i, y0 + z) - z)
                z = z + change
            unsolved = unsolved + jnp.abs(change)
            k.append((z - offset) / gamma)
            offset = z
        if equations.explicit_field is not None:
            l.append(equations.evaluate(equations.explicit_field, scheme.explicit_c[i], x, y0 + offset))
    w = offset[None]
    error = jnp.abs(weighted_sum(jnp.zeros_like(y0), (scheme.b_error, k), (scheme.f_error, l))) + unsolved
    end = k[-1] + l[-1] if scheme.multiple else k[-1]
    return y0 + equations.increment(w, k, l), error, end / h


def _inverse(matrix: Float[Array, " D D"]) -> Float[Array, " D D"]:
    # By elimination in the order of the rows. Where that is inaccurate, the iterations do not converge, and it shows.
    size = matrix.shape[0]
    rows = [jnp.concatenate([matrix[i], jnp.eye(size, dtype=matrix.dtype)[i]]) for i in range(size)]
    for k in range(size):
        rows[k] = rows[k] / rows[k][k]
        for i in range(size):
            if i != k:
                rows[i] = rows[i] - rows[i][k] * rows[k]
    return jnp.stack([row[size:] for row in rows])
