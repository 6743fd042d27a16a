"""Dense output inside a window: the base solver's interpolant of the fine step that contains a time."""

import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._recurrence import nan_derivative_unless


_KEY = "steps"


class FineSteps(eqx.Module):
    """The fine steps of a window, as dense output needs them.

    **Attributes:**

    - `ts`: the ends of the fine steps, increasing, shape `(N + 1,)`.
    - `infos`: the base solver's `dense_info` of each fine step, stacked.
    - `finite`: the fine steps whose outcome is finite, shape `(N,)`.
    - `solved`: the fine steps whose equation holds, shape `(N,)`.
    """

    ts: Float[Array, " N1"]
    infos: PyTree
    finite: Bool[Array, " N"]
    solved: Bool[Array, " N"]

    def as_dense_info(self) -> dict[str, "FineSteps"]:
        """The `dense_info` of a Diffrax step, which must be a dictionary of arguments of `interpolation_cls`."""
        return {_KEY: self}

    @staticmethod
    def of_dense_info(dense_info: dict[str, Any]) -> "FineSteps":
        """The inverse of `as_dense_info`, also for the stacked `infos` of a `diffrax.DenseInterpolation`."""
        return dense_info[_KEY]


class WindowInterpolation(dfx.AbstractLocalInterpolation):
    """Evaluates the base solver's interpolant of the fine step that contains a time.

    On a fine step that is not finite the value is NaN, as it is in a sequential solve. An event or a saved time there can
    then not be mistaken for a result.

    **Arguments:**

    - `interpolation_cls`: the base solver's.
    - `t0`, `t1`: the ends of the window.
    - `steps`: its fine steps.

    **Cost** of an evaluation: a binary search over `N` times and one local interpolant.
    """

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    steps: FineSteps
    interpolation_cls: Callable = eqx.field(static=True)

    def __init__(self, interpolation_cls, *, t0, t1, steps):
        self.t0, self.t1, self.steps = t0, t1, steps
        self.interpolation_cls = interpolation_cls

    def evaluate(self, t0, t1=None, left: bool = True) -> PyTree:
        """The state at `t0`, or its change from `t0` to `t1`. At the end of a fine step, `left` selects the earlier one."""
        if t1 is not None:
            return jtu.tree_map(lambda b, a: b - a, self.evaluate(t1, left=left), self.evaluate(t0, left=left))
        ts, infos = self.steps.ts, self.steps.infos
        # Unrolled: on a GPU, a loop costs more than its 14 comparisons.
        index = jnp.searchsorted(ts, t0, side="left" if left else "right", method="scan_unrolled") - 1
        # Steps of length zero, at the end of a window, cannot be interpolated.
        last = jnp.searchsorted(ts, ts[-1], side="left", method="scan_unrolled") - 1
        index = jnp.clip(index, 0, jnp.maximum(last, 0))
        local = self.interpolation_cls(t0=ts[index], t1=ts[index + 1], **jtu.tree_map(lambda x: x[index], infos))
        value = local.evaluate(t0, left=left)
        valid = self.steps.finite[index]
        return jtu.tree_map(lambda x: nan_derivative_unless(valid, jnp.where(valid, x, jnp.nan)), value)


@ft.cache
def window_interpolation(interpolation_cls: Callable) -> Callable[..., WindowInterpolation]:
    """`WindowInterpolation` with the given interpolant.

    It is cached because it is part of the structure of a `diffrax.Solution`: the structures of two solves must be equal.
    """
    return ft.partial(WindowInterpolation, interpolation_cls)
