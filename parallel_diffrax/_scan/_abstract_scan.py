"""The interface of a scan, which evaluates a recurrence."""

import abc
import functools
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.lax as lax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ._transitions import AbstractTransitions


_Element = TypeVar("_Element")


def _compose(first, then):
    """Affine maps `d -> A d + r` compose associatively: `(A2 A1, A2 r1 + r2)`."""
    (A1, r1), (A2, r2) = first, then
    return A2.after(A1), A2.apply(r1) + r2


class AbstractScan(eqx.Module):
    """Combines all steps of a sequence. All scans agree to rounding.

    To write another, implement `prefix`. Override `linear` if linear recurrences have a cheaper evaluation.
    """

    @abc.abstractmethod
    def prefix(
        self, compose: Callable[[_Element, _Element], _Element], elements: _Element, *, reverse: bool = False
    ) -> _Element:
        """All prefix products of an associative operation.

        **Arguments:** `compose(first, then)`, associative, for any number of leading axes; `elements`, a pytree of arrays
        whose leading axis is time, of length `N >= 1`; `reverse`, whether to start from the last element, so that `first`
        is the later one in time.

        **Returns:** the product of the elements `0 .. i` at `i`; in reverse, of `i .. N-1`.
        """

    def place(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Places arrays whose leading axis is time on the devices of this scan. By default they stay where they are."""
        return tree

    def replicate(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Copies arrays to every device of this scan. By default they stay where they are."""
        return tree

    def write(
        self, y: Float[Array, " N *D"], rows: Float[Array, " n *D"], start: Int[ArrayLike, ""]
    ) -> Float[Array, " N *D"]:
        """`y` with its entries from `start` on replaced by `rows`, which must not extend beyond the end."""
        return lax.dynamic_update_slice_in_dim(y, rows, start, axis=0)

    def linear(
        self, transitions: AbstractTransitions, r: Float[Array, " N *D"], *, reverse: bool = False
    ) -> Float[Array, " N *D"]:
        """`d[i] = A[i] d[i-1] + r[i]`, or `d[i] = A[i] d[i+1] + r[i]` in reverse. `transitions.apply` must accept `r` in
        the given shape."""
        return self.prefix(_compose, (transitions, r), reverse=reverse)[1]

    def solve(
        self, transitions: AbstractTransitions, r: Float[Array, " N D"], *, transpose: bool = False
    ) -> Float[Array, " N D"]:
        """Solves the recurrence or its transpose.

            d[i] = A[i] d[i-1] + r[i],        d[-1] = 0          (L d = r)
            w[i] = A[i+1]^T w[i+1] + r[i],    w[N] = 0           (L^T w = r, with `transpose`)

        **Arguments:** `transitions`, the matrices `A` (`N >= 1`; `A[0]` is never read); `r`, the right-hand side, shape
        `(N, D)`; `transpose`, whether to solve the transposed system, which runs backwards in time.

        **Returns:** the solution, shape `(N, D)`. A non-finite input makes the output non-finite from that step on. Nothing
        is raised or replaced.
        """
        with jax.named_scope(type(self).__name__):
            if not transpose:
                return transitions.evaluate(self.linear, r)
            # The transposed system is a recurrence of the same form, run from the end.
            return transitions.reversed().evaluate(functools.partial(self.linear, reverse=True), r)
