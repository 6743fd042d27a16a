"""The exact diagonal of the Jacobian: quasi-Newton."""

import jax.numpy as jnp

from ..._scan import DiagonalTransitions
from ._base import AbstractJacobian, linearised, rows


class Diagonal(AbstractJacobian):
    """The diagonal of every step's Jacobian, exactly. `ParallelNewton(jacobian=Diagonal())` is quasi-DEER: linear
    convergence, fast where components depend mostly on themselves.

    Cost of an iteration: `D` Jacobian-vector products of a step, one after the other so that memory stays at a few `N D`,
    and `D` multiplications a step for the scan. `Hutchinson` estimates the same at a fixed number of products.

    ??? cite "Reference"

        Gonzalez, Warrington, Smith, Linderman, "Towards scalable and stable parallelization of nonlinear RNNs",
        NeurIPS 2024, arXiv 2407.19115.
    """

    def linearise(self, residual, y):
        r, product, aux = linearised(residual, y)
        own = jnp.arange(y.shape[1])[:, None]
        return r, DiagonalTransitions(rows(product, y, own)[..., 0]), aux
