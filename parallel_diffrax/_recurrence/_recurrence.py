"""A nonlinear recurrence, and its steps as one system of equations."""

import dataclasses
from collections.abc import Callable
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._scan import preceded_by
from ._stages import AbstractStages, LinearisedStep


class Recurrence(eqx.Module):
    """All steps of a sequential process: `y[i] = F(y[i-1], x[i])` for `i = 0 .. N-1`, with `y[-1] = init`.

    It is a pytree in everything that can be differentiated: `init`, `inputs` and the arrays that `map` closes over.

    **Arguments:**

    - `map`: `F`, from a state of shape `(D,)` and one element of `inputs` to a state of shape `(D,)`. If `incremental`, the
        increment `F(y, x) - y` instead.
    - `init`: the state before the first step, shape `(D,)`.
    - `inputs`, `length`: a pytree of arrays whose leading axis has length `N`; `N`.
    - `incremental`: whether `map` returns the increment. The residual is then `(y[i-1] - y[i]) + increment`. Its rounding
        error is relative to the increment, not to the state. The root is therefore exact to the last digit of the dtype, and
        the rounding errors of steps do not accumulate as they do sequentially.
    - `active`: the steps to make, shape `(N,)`; `None` for all. The other steps leave the state unchanged.
    - `stages`: the inner unknowns of steps that solve equations, if they are solved together with the states. It must close
        over no arrays, and needs an incremental `map`.
    """

    map: Callable[[Float[Array, " D"], PyTree], Float[Array, " D"]]
    init: Float[Array, " D"]
    inputs: PyTree
    length: int = eqx.field(static=True)
    incremental: bool = eqx.field(static=True, default=False)
    active: Bool[Array, " N"] | None = None
    stages: AbstractStages | None = None

    @classmethod
    def make(cls, map, init, inputs, length, incremental=False, stages=None) -> "Recurrence":
        """Like the constructor, but moves every array that `map` closes over into the pytree. Otherwise the derivative would
        miss a traced array in a closure."""
        first = jtu.tree_map(lambda x: x[0], inputs)
        map = eqx.filter_closure_convert(map, init, first)
        return cls(map, init, inputs, length, incremental, stages=stages)

    def step(self, y: Float[Array, " D"], x: PyTree) -> Float[Array, " D"]:
        """One step, `F(y, x)`."""
        return y + self.map(y, x) if self.incremental else self.map(y, x)

    def previous(self, y: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """The state before each step: `init, y[0], ..., y[N-2]`."""
        return preceded_by(self.init, y)

    def residual(self, y: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """`r[i] = F(y[i-1], x[i]) - y[i]`, zero at the solution. With inner unknowns, `F` is one Newton iteration on them
        from their guess."""
        if self.stages is not None:
            return self.linearised(y, cast(Array, self.guess_stages(y)))[0]
        previous = self.previous(y)
        mapped = jax.vmap(self.map)(previous, self.inputs)
        if self.active is not None:
            mapped = jnp.where(self.active[:, None], mapped, 0 if self.incremental else previous)
        return (previous - y) + mapped if self.incremental else mapped - y

    def guess_stages(self, y: Float[Array, " N D"]) -> Float[Array, " N S D"] | None:
        """A guess of the inner unknowns for the states `y`; `None` if there are none."""
        if self.stages is None:
            return None
        return jax.vmap(self.stages.guess)(self.previous(y), y, self.inputs)

    def linearised(
        self, y: Float[Array, " N D"], w: Float[Array, " N S D"]
    ) -> tuple[Float[Array, " N D"], LinearisedStep]:
        """Makes one Newton iteration on the inner unknowns `w`. Returns the residual after it, and all steps as affine
        functions."""
        assert self.stages is not None
        previous = self.previous(y)
        step = jax.vmap(self.stages.linearise)(previous, w, self.inputs)
        if self.active is not None:
            # An inactive step leaves the state unchanged.
            identity = jnp.broadcast_to(jnp.eye(y.shape[1], dtype=y.dtype), step.matrix.shape)
            still = eqx.tree_at(lambda step: step.matrix, jtu.tree_map(jnp.zeros_like, step), identity)
            step = _where(self.active, step, still)
        return (previous - y) + step.value, step

    def step_all(self, previous: Float[Array, " N D"], inputs: PyTree, y: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """Makes all steps from the states `previous`. The result is about `y`, near which inner unknowns are sought."""
        if self.stages is None:
            return jax.vmap(self.step)(previous, inputs)
        y = jnp.where(jnp.all(jnp.isfinite(y), axis=1, keepdims=True), y, previous)
        return previous + jax.vmap(self.stages.solve)(previous, y, inputs)

    @property
    def first_input(self) -> PyTree:
        """`x[0]`."""
        return jtu.tree_map(lambda x: x[0], self.inputs)

    def inputs_from(self, start: Int[ArrayLike, ""], count: int) -> PyTree:
        """The inputs of `count` steps from step `start`. Beyond the end, the last input repeats."""
        index = jnp.minimum(start + jnp.arange(count), self.length - 1)
        return jtu.tree_map(lambda x: x[index], self.inputs)

    def segment(
        self, start: Int[ArrayLike, ""], count: Int[ArrayLike, ""], init: Float[Array, " D"], capacity: int
    ) -> "Recurrence":
        """`count` steps from step `start` and state `init`, as a recurrence of its own with arrays of length `capacity`."""
        all_inputs = isinstance(start, int) and (start, capacity) == (0, self.length)
        if all_inputs and isinstance(count, int) and count == self.length:
            return self
        active = jnp.arange(capacity) < count
        inputs = self.inputs if all_inputs else self.inputs_from(start, capacity)
        return dataclasses.replace(self, init=init, inputs=inputs, length=capacity, active=active)

    def with_inputs(self, inputs: PyTree) -> "Recurrence":
        """The same steps with other inputs."""
        return dataclasses.replace(self, inputs=inputs)

    def guard(self, y: Float[Array, " N D"], finite: Bool[Array, " N"]) -> tuple[Float[Array, " N D"], PyTree]:
        """The state before each step and its inputs, with those of the first step where a step is not `finite`. Results are
        then finite wherever the first step is. A derivative that a later `where` discards is zero, not `0 * nan`."""
        previous = jnp.where(finite[:, None], self.previous(y), self.init[None])
        return previous, _where(finite, self.inputs, jtu.tree_map(lambda x: x[:1], self.inputs))


def _where(steps: Bool[Array, " N"], tree: PyTree, other: PyTree) -> PyTree:
    """`tree` at the given steps, `other` elsewhere."""
    return jtu.tree_map(lambda a, b: jnp.where(steps.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), tree, other)
