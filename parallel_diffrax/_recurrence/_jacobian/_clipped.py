"""A Jacobian whose diagonal does not grow."""

from ..._scan import check_instance
from ._base import AbstractJacobian
from ._diagonal import Diagonal


class Clipped(AbstractJacobian):
    """Another approximation with the diagonal of every `A[i]` clipped to `[-limit, limit]`. For a diagonal `A` and
    `limit = 1` the linear recurrence cannot grow, however unstable the steps are.

    **Arguments:**

    - `base`: the approximation, by default `Diagonal()`.
    - `limit`: the largest magnitude on the diagonal, by default 1.

    Cost: that of `base`.

    ??? cite "Reference"

        Gonzalez, Warrington, Smith, Linderman, "Towards scalable and stable parallelization of nonlinear RNNs",
        NeurIPS 2024, arXiv 2407.19115.
    """

    base: AbstractJacobian = Diagonal()
    limit: float = 1.0

    def __check_init__(self):
        check_instance("Clipped", "base", self.base, AbstractJacobian, "Diagonal()")
        if not self.limit > 0:
            raise ValueError(f"`Clipped(limit={self.limit!r})`: expected a positive number.")

    def linearise(self, residual, y):
        r, transitions, aux = self.base.linearise(residual, y)
        return r, transitions.clipped(self.limit), aux
