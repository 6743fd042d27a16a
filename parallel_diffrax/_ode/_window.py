"""All fine steps of one window: the recurrence to solve, and what is read off its solution."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._recurrence import Ravel, Recurrence, stop_gradient
from .._scan import preceded_by, with_row
from ._step_map import AbstractStepMap, StepOutput


def uniform_times(t0: Float[ArrayLike, ""], t1: Float[ArrayLike, ""], num_steps: int) -> Float[Array, " N1"]:
    """`num_steps + 1` equidistant times from `t0` to `t1`, rounded as Diffrax's `ConstantStepSize` rounds them."""
    index = jnp.arange(num_steps + 1, dtype=jnp.result_type(t0))
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    ts = t0 + (t1 - t0) * (index / num_steps)
    return with_row(ts, -1, t1)


def listed_times(
    ts: Float[Array, " M1"], t0: Float[ArrayLike, ""], t1: Float[ArrayLike, ""], num_steps: int
) -> tuple[Float[Array, " N1"], Int[Array, ""], Bool[Array, ""]]:
    """Those of the increasing times `ts` that lie between two of them, `t0` and `t1`.

    **Returns:** `num_steps + 1` times from `t0` on, at the end `t1` as often as is needed; how many steps they make; and
    whether `t0` and `t1` are among `ts`, with no more than `num_steps` steps between them.
    """
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    first, last = jnp.argmin(jnp.abs(ts - t0)), jnp.argmin(jnp.abs(ts - t1))
    index = first + jnp.arange(num_steps + 1)
    times = with_row(jnp.where(index >= last, t1, ts[jnp.minimum(index, last)]), 0, t0)
    # Diffrax moves a time to its neighbour at jumps.
    rounding = 4 * jnp.finfo(ts.dtype).eps
    near = [jnp.abs(ts[i] - t) <= rounding * jnp.abs(t) for i, t in ((first, t0), (last, t1))]
    return times, last - first, near[0] & near[1] & (first < last) & (last - first <= num_steps)


class Window(eqx.Module):
    """`num_steps` fine steps of a base solver over `[t0, t1]`.

    **Arguments:**

    - `step_map`: one fine step.
    - `interpolation_cls`: the base solver's dense output.
    - `ts`: the ends of the fine steps, shape `(N + 1,)`, increasing.
    - `y0`: the state at `ts[0]`; with a step map that has a memory, the pair of the state and the memory.
    - `count`: how many of the `N` steps there are; the others, at the end, have length zero.
    """

    step_map: AbstractStepMap
    interpolation_cls: Callable = eqx.field(static=True)
    ts: Float[Array, " N1"]
    y0: PyTree[Array]
    count: Int[ArrayLike, ""]

    @property
    def num_steps(self) -> int:
        """`N`."""
        return self.ts.shape[0] - 1

    def part(
        self, start: Int[ArrayLike, ""], state: Float[Array, " D"], count: Int[ArrayLike, ""], capacity: int
    ) -> "Window":
        """`count` steps from `start`, where the raveled state is `state`, in arrays for `capacity` steps."""
        ts = self.ts[start + jnp.minimum(jnp.arange(capacity + 1), count)]
        count = jnp.clip(jnp.asarray(self.count) - start, 0, count)
        return Window(self.step_map, self.interpolation_cls, ts, self.ravel.unravel(state), count)

    def on(self, fractions: Float[Array, " N1"] | None) -> "Window":
        """The same window with fine steps that end at these fractions of it, which are not differentiated."""
        if fractions is None:
            return self
        t0, t1 = self.ts[0], self.ts[-1]
        ts = with_row(with_row(t0 + fractions * (t1 - t0), 0, t0), -1, t1)
        return eqx.tree_at(lambda window: window.ts, self, ts)

    def stateless(self) -> "Window":
        """With steps that start afresh."""
        y0, _ = self.step_map.end(self.y0)
        return Window(self.step_map.stateless, self.interpolation_cls, self.ts, y0, self.count)

    @property
    def ravel(self) -> Ravel:
        """Between states and vectors."""
        return Ravel(self.y0)

    def recurrence(self) -> Recurrence:
        """The fine steps as a recurrence of raveled states, with inputs `(ts[i], ts[i + 1])`."""
        ravel, incremental = self.ravel, self.step_map.has_increment

        def step(y, times):
            t0, t1 = times
            y0 = ravel.unravel(y)
            return ravel.ravel(self.step_map.increment(t0, t1, y0) if incremental else self.step_map(t0, t1, y0).y1)

        inputs = (self.ts[:-1], self.ts[1:])
        return Recurrence.make(step, ravel.ravel(self.y0), inputs, self.num_steps, incremental, self.step_map.stages)

    def evaluate_steps(self, recurrence: Recurrence, y: Float[Array, " N D"], finite: Bool[Array, " N"]) -> StepOutput:
        """Every fine step made once more, from the states `y` of the solution: error estimates and dense output of each,
        as ordinary functions of `y`. Steps that are not healthy repeat the first one."""
        previous, (ts, following) = recurrence.guard(y, finite)
        ravel = self.ravel
        known = stop_gradient(jnp.where(finite[:, None], y, previous))

        def step(t0, t1, y0, y1):
            return self.step_map(t0, t1, ravel.unravel(y0), ravel.unravel(y1))

        return jax.vmap(step)(ts, following, previous, known)


def window_error(
    window: Window,
    y: Float[Array, " N D"],
    y_error: PyTree | None,
    tolerance: tuple[Float[ArrayLike, ""], Float[ArrayLike, ""]],
    failed: Bool[Array, ""],
) -> PyTree | None:
    """The error estimate of a window: the sum of the magnitudes of its fine steps' estimates, which bounds their effect
    on the end of the window if errors do not grow; infinite if the window failed.

    With a tolerance `atol + rtol |y|`, each estimate counts relative to the tolerance at its own step; what is returned is
    as large relative to the tolerance at the ends of the window, which is what step-size controllers compare with. Without
    an absolute tolerance estimates count as they are, which is stricter where a solution is larger in the middle of a
    window than at both ends.

    **Arguments:** the window; its states; the estimates of all fine steps; `rtol` and `atol`; whether it failed.
    """
    if y_error is None:
        return None
    rtol, atol = tolerance
    (init, _), (states, _) = window.step_map.end(window.y0), window.step_map.end(jax.vmap(window.ravel.unravel)(y))
    ravel = Ravel(init)
    init, y, error = ravel.ravel(init), jax.vmap(ravel.ravel)(states), jnp.abs(jax.vmap(ravel.ravel)(y_error))
    before = preceded_by(init, y)
    relative = jnp.asarray(atol) > 0
    at_step = jnp.where(relative, atol + rtol * jnp.maximum(jnp.abs(before), jnp.abs(y)), 1)
    at_ends = jnp.where(relative, atol + rtol * jnp.maximum(jnp.abs(init), jnp.abs(y[-1])), 1)
    total = ravel.unravel(jnp.sum(error / at_step, axis=0) * at_ends)
    return jtu.tree_map(lambda e: jnp.where(failed, jnp.inf, e), total)
