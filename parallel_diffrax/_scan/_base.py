"""The interface of every evaluation of a linear recurrence."""

import abc

import equinox as eqx
from jaxtyping import Array, Float

from ._transitions import AbstractTransitions


class AbstractScan(eqx.Module):
    """A way to evaluate `d[i] = A[i] d[i-1] + r[i]`, and its transpose. All ways agree to rounding."""

    @abc.abstractmethod
    def solve(
        self, transitions: AbstractTransitions, r: Float[Array, " N D"], *, transpose: bool = False
    ) -> Float[Array, " N D"]:
        """Solves `L d = r`, or `L^T w = r`, of the package's notation.

        **Arguments:**

        - `transitions`: `A`, with time as the first axis, `N >= 1`.
        - `r`: the right-hand side, shape `(N, D)`.
        - `transpose`: whether to solve the transposed system, which runs backwards in time.

        **Returns:** the solution, shape `(N, D)`. Non-finite input makes non-finite output from there on; nothing is
        raised and nothing is replaced.
        """
