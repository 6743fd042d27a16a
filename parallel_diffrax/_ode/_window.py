"""All fine steps of one window: the recurrence to solve, and what is read off its solution."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._recurrence import Ravel, Recurrence
from ._step_map import AbstractStepMap, StepOutput


def uniform_times(t0: Float[ArrayLike, ""], t1: Float[ArrayLike, ""], num_steps: int) -> Float[Array, " N1"]:
    """`num_steps + 1` equidistant times from `t0` to `t1`, rounded as Diffrax's `ConstantStepSize` rounds them."""
    index = jnp.arange(num_steps + 1, dtype=jnp.result_type(t0))
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    ts = t0 + (t1 - t0) * (index / num_steps)
    return ts.at[-1].set(t1)


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
        return Window(self.step_map, self.interpolation_cls, ts, self.ravel.unravel(state), count)

    def memoryless(self) -> "Window":
        """With steps that start afresh."""
        y0, _ = self.step_map.end(self.y0)
        return Window(self.step_map.memoryless, self.interpolation_cls, self.ts, y0, self.count)

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
        return Recurrence.make(step, ravel.ravel(self.y0), inputs, self.num_steps, incremental)

    def sweep(self, recurrence: Recurrence, y: Float[Array, " N D"], healthy: Bool[Array, " N"]) -> StepOutput:
        """Every fine step made once more, from the states `y` of the solution: error estimates and dense output of each,
        as ordinary functions of `y`. Steps that are not healthy repeat the first one."""
        previous, (ts, following) = recurrence.guard(y, healthy)
        ravel = self.ravel
        return jax.vmap(lambda t0, t1, y0: self.step_map(t0, t1, ravel.unravel(y0)))(ts, following, previous)


def accumulate_error(y_error: PyTree | None, failed: Bool[Array, ""]) -> PyTree | None:
    """The error estimate of a window: the sum of the magnitudes of its fine steps' estimates, which bounds their effect
    on the end of the window if errors do not grow; infinite if the window failed."""
    if y_error is None:
        return None
    total = jtu.tree_map(lambda e: jnp.sum(jnp.abs(e), axis=0), y_error)
    return jtu.tree_map(lambda e: jnp.where(failed, jnp.inf, e), total)
