"""Dense output inside a window: the base solver's own interpolant on the right fine step."""

import functools as ft
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._recurrence import nan_derivative_unless


class WindowInterpolation(dfx.AbstractLocalInterpolation):
    """Evaluates the base solver's interpolant on the fine step that contains a time.

    **Arguments:**

    - `interpolation_cls`: the base solver's.
    - `t0`, `t1`: the window.
    - `ts`: the ends of all fine steps, shape `(N + 1,)`.
    - `infos`: the base solver's `dense_info` of every fine step, stacked.
    - `healthy`: the fine steps that have a finite outcome; on others the value is NaN, as it is in sequence, so that an
        event or a saved time there cannot be taken for a result.
    - `sound`: the fine steps whose equation is known to hold: events are looked for on these alone.

    Cost of an evaluation: a binary search over `N` times, one local interpolant.
    """

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    ts: Float[Array, " N1"]
    infos: PyTree
    finite: Bool[Array, " N"]
    solved: Bool[Array, " N"]
    interpolation_cls: Callable = eqx.field(static=True)

    def __init__(self, interpolation_cls, *, t0, t1, ts, infos, finite, solved):
        self.t0, self.t1, self.ts, self.infos, self.finite, self.solved = t0, t1, ts, infos, finite, solved
        self.interpolation_cls = interpolation_cls

    def evaluate(self, t0, t1=None, left: bool = True) -> PyTree:
        """The state at `t0`; or its change from `t0` to `t1`. `left` chooses the fine step at a time where two meet."""
        if t1 is not None:
            return jtu.tree_map(lambda b, a: b - a, self.evaluate(t1, left=left), self.evaluate(t0, left=left))
        # Unrolled: on a GPU, a loop costs more than its 14 comparisons.
        index = jnp.searchsorted(self.ts, t0, side="left" if left else "right", method="scan_unrolled") - 1
        # Steps of length zero, at the end of a window, interpolate nothing.
        last = jnp.searchsorted(self.ts, self.ts[-1], side="left", method="scan_unrolled") - 1
        index = jnp.clip(index, 0, jnp.maximum(last, 0))
        local = self.interpolation_cls(
            t0=self.ts[index], t1=self.ts[index + 1], **jtu.tree_map(lambda x: x[index], self.infos)
        )
        value = local.evaluate(t0, left=left)
        valid = self.finite[index]
        return jtu.tree_map(lambda x: nan_derivative_unless(valid, jnp.where(valid, x, jnp.nan)), value)


@ft.cache
def window_interpolation(interpolation_cls: Callable) -> Callable[..., WindowInterpolation]:
    """`WindowInterpolation` over the given interpolant: the same object each time, since it is part of the structure of
    a `diffrax.Solution`, which must compare equal from one solve to the next."""
    return ft.partial(WindowInterpolation, interpolation_cls)
