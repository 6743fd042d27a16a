"""The interface of every evaluation of a recurrence by a scan."""

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
    """A way to combine all steps of a sequence. All ways agree to rounding.

    A new way implements `prefix`; it may override `linear` where it knows something cheaper.
    """

    @abc.abstractmethod
    def prefix(
        self, compose: Callable[[_Element, _Element], _Element], elements: _Element, *, reverse: bool = False
    ) -> _Element:
        """All prefix products of an associative operation.

        **Arguments:**

        - `compose`: `compose(first, then)`, associative; works with any number of leading axes.
        - `elements`: a pytree of arrays whose leading axis is time, `N >= 1`.
        - `reverse`: whether to start from the last element; `first` is then the later one.

        **Returns:** at `i` the product of the elements `0 .. i`, or `i .. N-1`.
        """

    def place(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Arrays whose leading axis is time, on the devices on which this scan wants them: wherever they are."""
        return tree

    def replicate(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Arrays as they are, on every device that this scan uses."""
        return tree

    def write(
        self, y: Float[Array, " N *D"], rows: Float[Array, " n *D"], start: Int[ArrayLike, ""]
    ) -> Float[Array, " N *D"]:
        """`y` with these rows from `start` on, for which there must be room."""
        return lax.dynamic_update_slice_in_dim(y, rows, start, axis=0)

    def linear(
        self, transitions: AbstractTransitions, r: Float[Array, " N *D"], *, reverse: bool = False
    ) -> Float[Array, " N *D"]:
        """`d[i] = A[i] d[i-1] + r[i]`, for transitions that apply to the entries of `r` as they are; in reverse,
        `d[i] = A[i] d[i+1] + r[i]`."""
        return self.prefix(_compose, (transitions, r), reverse=reverse)[1]

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
        with jax.named_scope(type(self).__name__):
            if not transpose:
                return transitions.evaluate(self.linear, r)
            # The transposed system is the same recurrence, run from the end.
            return transitions.reversed().evaluate(functools.partial(self.linear, reverse=True), r)
