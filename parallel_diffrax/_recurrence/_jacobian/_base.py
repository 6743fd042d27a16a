"""The interface of every Jacobian approximation."""

import abc
from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from ..._scan import AbstractTransitions


class AbstractJacobian(eqx.Module):
    """How to linearise the residual `r[i](y) = F[i](y[i-1]) - y[i]` of a recurrence: what takes the place of
    `A[i] = dF[i]/dy` at `y[i-1]`.

    Only products of the residual's Jacobian with vectors are needed, never the steps themselves, so that a residual
    which went through `optimistix.root_find` serves as well as one of ours.
    """

    @abc.abstractmethod
    def linearise(
        self, residual: Callable[[Float[Array, " N D"]], tuple[Float[Array, " N D"], PyTree]], y: Float[Array, " N D"]
    ) -> tuple[Float[Array, " N D"], AbstractTransitions, PyTree]:
        """The residual at `y` and its transitions, in one pass.

        **Arguments:**

        - `residual`: maps `y` of shape `(N, D)` to the residual of the same shape, and any auxiliary output.
        - `y`: where to linearise.

        **Returns:** the residual, the transitions (approximate or exact), the auxiliary output.
        """
