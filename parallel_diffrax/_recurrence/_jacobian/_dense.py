"""The exact Jacobian: Newton's method."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from ..._scan import DenseTransitions
from ._base import AbstractJacobian


class Dense(AbstractJacobian):
    """The full Jacobian of every step. `ParallelNewton(jacobian=Dense())` is Newton's method, DEER: quadratic.

    The Jacobian of the residual is block bidiagonal, so the vector with `e_k` at every step gives the `k`-th column of
    all `A[i]` at once: `J e_k = A[i] e_k - e_k`.

    Cost of an iteration: `D` Jacobian-vector products of a step and `D^3` multiplications a step for the scan; memory
    `N D^2`.

    ??? cite "Reference"

        Lim, Zhu, Selfridge, Kasim, "Parallelizing non-linear sequential models over the sequence length", ICLR 2024,
        arXiv 2309.12252.
    """

    exact: ClassVar[bool] = True

    def linearise(self, residual, y):
        seeds = jnp.eye(y.shape[1], dtype=y.dtype)

        def column(seed):
            return jax.jvp(residual, (y,), (jnp.broadcast_to(seed, y.shape),), has_aux=True)

        r, columns, aux = jax.vmap(column, out_axes=(None, -1, None))(seeds)
        return r, DenseTransitions(columns + seeds), aux
