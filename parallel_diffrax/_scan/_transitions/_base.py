"""The interface of every structure of `A`."""

import abc
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from .._shifts import shift


_Transitions = TypeVar("_Transitions", bound="AbstractTransitions")


class AbstractTransitions(eqx.Module):
    """The matrices `A[0], ..., A[N-1]` of `d[i] = A[i] d[i-1] + r[i]`, in some structure.

    Every array of a structure has time as its first axis and is linear in `A`, so that
    `jax.tree.map(lambda a: a[i:j], transitions)` is a segment of it. A structure is closed under products. It is a number
    of diagonal blocks of equal size, on which `blocks`, `split` and `join` give a view: one block if it is full, `D` if it
    is diagonal.
    """

    @abc.abstractmethod
    def apply(self, d: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """`A[i] d[i]` for every `i`. Without the time axis on both: `A d`."""

    @abc.abstractmethod
    def after(self: _Transitions, first: _Transitions) -> _Transitions:
        """`self[i] @ first[i]` for every `i`: first `first`, then `self`."""

    @abc.abstractmethod
    def transposed(self: _Transitions) -> _Transitions:
        """`A[i]^T` at `i`."""

    @abc.abstractmethod
    def clipped(self: _Transitions, limit: float) -> _Transitions:
        """These transitions with the entries on the diagonal of every `A[i]` clipped to `[-limit, limit]`."""

    @abc.abstractmethod
    def dense(self) -> Float[Array, " N D D"]:
        """All matrices written out, at `N D^2` memory."""

    @abc.abstractmethod
    def blocks(self) -> Float[Array, "*N B b b"]:
        """The `B` diagonal blocks of size `b`."""

    @abc.abstractmethod
    def split(self, d: Float[Array, "*N D"]) -> Float[Array, "*N B b"]:
        """The entries of `d` that each block acts on."""

    @abc.abstractmethod
    def join(self, parts: Float[Array, "*N B b"]) -> Float[Array, "*N D"]:
        """The inverse of `split`."""

    def evaluate(self, linear: Callable, r: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """`linear(transitions, r)`, the evaluation of a recurrence by a scan, in whatever form is cheapest for it."""
        return linear(self, r)

    def reversed(self: _Transitions) -> _Transitions:
        """The transitions of the transposed system: `A[i+1]^T` at `i`, zero at `N - 1`."""
        return jtu.tree_map(lambda a: shift(a, -1), self.transposed())

    def where(self: _Transitions, mask: Bool[Array, " N"]) -> _Transitions:
        """These transitions where `mask` holds, zero elsewhere. Zeroes non-finite entries too."""
        return jtu.tree_map(lambda a: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, 0), self)

    def abs(self: _Transitions) -> _Transitions:
        """The magnitudes of all entries."""
        return jtu.tree_map(jnp.abs, self)

    def scaled(self: _Transitions, factor: float | Float[Array, ""]) -> _Transitions:
        """`factor A[i]` at `i`."""
        return jtu.tree_map(lambda a: factor * a, self)

    def finite(self) -> Bool[Array, " N"] | Bool[Array, ""]:
        """Whether every entry of `A[i]` is finite."""
        finite = jnp.array(True)
        for a in jtu.tree_leaves(self):
            finite = finite & jnp.all(jnp.isfinite(a), axis=tuple(range(1, a.ndim)))
        return finite
