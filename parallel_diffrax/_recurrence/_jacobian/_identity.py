"""The identity in place of the Jacobian: Picard iteration."""

import jax.numpy as jnp

from ..._scan import ScalarTransitions
from ._base import AbstractJacobian


class Identity(AbstractJacobian):
    """`A[i] = I`. `ParallelNewton(jacobian=Identity())` is Picard iteration: the new `y[i]` is the initial state plus the
    sum of all increments `F(y[l-1]) - y[l-1]`, `l <= i`, of the old iterate. It converges for short times and small steps,
    and without derivatives.

    Cost of an iteration: one evaluation of a step and a cumulative sum; memory `N D`.

    ??? cite "Reference"

        Shih et al., "Parallel sampling of diffusion models", arXiv 2305.16317 (2023).
    """

    def linearise(self, residual, y):
        r, aux = residual(y)
        return r, ScalarTransitions(jnp.ones(y.shape[:1], y.dtype), y.shape[1]), aux
