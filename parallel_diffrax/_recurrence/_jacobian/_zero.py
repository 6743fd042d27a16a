"""Nothing in place of the Jacobian: Jacobi iteration."""

from ..._scan import ZeroTransitions
from ._base import AbstractJacobian


class Zero(AbstractJacobian):
    """`A[i] = 0`. `ParallelNewton(jacobian=Zero())` is Jacobi iteration, `y[i] <- F(y[i-1])` for all steps at once. It
    carries information one step an iteration, so it converges in few iterations only where a few steps forget the past.

    Cost of an iteration: one evaluation of a step, no scan; memory `N D`.

    ??? cite "Reference"

        Song, Meng, Liao, Ermon, "Accelerating feedforward computation via parallel nonlinear equation solving", ICML
        2021, arXiv 2002.03629.
    """

    def linearise(self, residual, y):
        r, aux = residual(y)
        return r, ZeroTransitions(y.shape[0], y.shape[1], y.dtype), aux
