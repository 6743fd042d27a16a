"""The interface of every Jacobian approximation."""

import abc
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..._scan import AbstractTransitions


Residual = Callable[[Float[Array, " N D"]], tuple[Float[Array, " N D"], PyTree]]


class AbstractJacobian(eqx.Module):
    """How to linearise the residual `r[i](y) = F[i](y[i-1]) - y[i]` of a recurrence: what takes the place of
    `A[i] = dF[i]/dy` at `y[i-1]`.

    Only products of the residual's Jacobian with vectors are needed, never the steps themselves, so that a residual
    which went through `optimistix.root_find` serves as well as one of ours.

    `exact` tells a root finder whether its updates are Newton's: then the last one bounds the error, and otherwise the
    rate of convergence must be measured.
    """

    exact: ClassVar[bool] = False

    @abc.abstractmethod
    def linearise(
        self, residual: Residual, y: Float[Array, " N D"]
    ) -> tuple[Float[Array, " N D"], AbstractTransitions, PyTree]:
        """The residual at `y` and its transitions, in one pass.

        **Arguments:**

        - `residual`: maps `y` of shape `(N, D)` to the residual of the same shape, and any auxiliary output.
        - `y`: where to linearise.

        **Returns:** the residual, the transitions (approximate or exact), the auxiliary output.
        """


def linearised(
    residual: Residual, y: Float[Array, " N D"]
) -> tuple[Float[Array, " N D"], Callable[[Float[Array, " N D"]], Float[Array, " N D"]], PyTree]:
    """The residual, the function `v -> (A[i] v[i-1])[i]`, and the auxiliary output.

    `v[i-1]` is taken as zero for the first step. For any residual of a recurrence `J v = A v[i-1] - v[i]`.
    """
    r, tangent, aux = jax.linearize(residual, y, has_aux=True)
    return r, lambda v: tangent(v) + v, aux


# Up to this many products with the Jacobian are written out, beyond they are made in a loop.
_LARGEST_UNROLLED_SIZE = 4


def rows(
    product: Callable[[Float[Array, " N D"]], Float[Array, " N D"]],
    y: Float[Array, " N D"],
    columns: Int[Array, " D b"],
) -> Float[Array, " N D b"]:
    """The entries `A[i][j, columns[j, l]]` at `[i, j, l]`, from `D` products, without any array of `N D^2` numbers.

    The vector with `e_k` at every step gives the `k`-th column of all `A[i]`; of it, the rows in which `columns`
    mentions `k` are kept.
    """
    size = y.shape[1]

    def add(k, total):
        seed = jnp.broadcast_to(jnp.arange(size) == k, y.shape).astype(y.dtype)
        column = product(seed)
        return total + jnp.where(columns == k, column[:, :, None], 0)

    total = jnp.zeros((*y.shape, columns.shape[1]), y.dtype)
    if size <= _LARGEST_UNROLLED_SIZE:
        for k in range(size):
            total = add(k, total)
        return total
    return jax.lax.fori_loop(0, size, add, total)
