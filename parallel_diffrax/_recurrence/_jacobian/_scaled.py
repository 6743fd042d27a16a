"""A Jacobian made smaller."""

from jaxtyping import Array, Float

from ..._scan import check_instance
from ._base import AbstractJacobian
from ._dense import Dense


class Scaled(AbstractJacobian):
    """`(1 - k) A[i]` for the `A` of another approximation: damps what is carried from step to step, between that method
    (`k = 0`) and Jacobi iteration (`k = 1`). Where products of the `A` grow, a small `k` stops them from overflowing; the
    convergence is then linear.

    **Arguments:**

    - `k`: the share that is taken away, in `[0, 1]`.
    - `base`: the approximation, by default `Dense()`.

    Cost: that of `base`.

    ??? cite "Reference"

        Gonzalez, "Parallel Newton methods", arXiv 2603.16850 (2026).
    """

    k: float | Float[Array, ""]
    base: AbstractJacobian = Dense()

    def __check_init__(self):
        # Written so that NaN fails.
        if isinstance(self.k, (int, float)) and not 0 <= self.k <= 1:
            raise ValueError(f"`Scaled(k={self.k!r})`: the share that is taken away must be between 0 and 1.")
        check_instance("Scaled", "base", self.base, AbstractJacobian, "Dense()")

    def linearise(self, residual, y):
        r, transitions, aux = self.base.linearise(residual, y)
        return r, transitions.scaled(1 - self.k), aux
