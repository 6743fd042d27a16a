"""A nonlinear recurrence, and the system of equations that it is."""

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
    """`y[i] = F(y[i-1], x[i])`, `y[-1] = init`, `i = 0 .. N-1`: all steps of something sequential, as one object.

    A pytree in everything that can be differentiated: what `map` closes over, `init` and `inputs`.

    **Arguments:**

    - `map`: `F`, from a state of shape `(D,)` and one element of `inputs` to a state of shape `(D,)`; or the increment
        `F(y, x) - y`.
    - `init`: the state before the first step, shape `(D,)`.
    - `inputs`: any pytree of arrays whose leading axis is the `N` steps.
    - `length`: `N`.
    - `active`: the steps that are made, or `None` for all; the others of a `segment` leave the state as it is.
    - `incremental`: whether `map` is the increment. A residual is then `(y[i-1] - y[i]) + increment`, whose rounding error
        is relative to the increment and not to the state: the root is found to the last digit of the dtype, and errors
        of the steps do not add up as they do in sequence.
    - `stages`: the inner unknowns of steps that solve equations, if these are to be solved together with the states; it
        closes over no arrays, and belongs to an incremental `map`.
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
        """As the constructor, after moving every array that `map` closes over into the pytree.

        Without that, a traced array in a closure would be lost to the derivative.
        """
        first = jtu.tree_map(lambda x: x[0], inputs)
        map = eqx.filter_closure_convert(map, init, first)
        return cls(map, init, inputs, length, incremental, stages=stages)

    def step(self, y: Float[Array, " D"], x: PyTree) -> Float[Array, " D"]:
        """`F(y, x)`, one step."""
        return y + self.map(y, x) if self.incremental else self.map(y, x)

    def previous(self, y: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """The states that the steps start from: `init, y[0], ..., y[N-2]`."""
        return preceded_by(self.init, y)

    def residual(self, y: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """`r[i] = F(y[i-1], x[i]) - y[i]`, zero at the solution. (Where there are inner unknowns, after one iteration on
        them from a guess.)"""
        if self.stages is not None:
            return self.linearised(y, cast(Array, self.guess_stages(y)))[0]
        previous = self.previous(y)
        mapped = jax.vmap(self.map)(previous, self.inputs)
        if self.active is not None:
            mapped = jnp.where(self.active[:, None], mapped, 0 if self.incremental else previous)
        return (previous - y) + mapped if self.incremental else mapped - y

    def guess_stages(self, y: Float[Array, " N D"]) -> Float[Array, " N S D"] | None:
        """Inner unknowns for the states `y`; `None` if there are none."""
        if self.stages is None:
            return None
        return jax.vmap(self.stages.guess)(self.previous(y), y, self.inputs)

    def linearised(
        self, y: Float[Array, " N D"], w: Float[Array, " N S D"]
    ) -> tuple[Float[Array, " N D"], LinearisedStep]:
        """One Newton iteration on the inner unknowns `w`: the residual after it, and all steps as affine functions."""
        assert self.stages is not None
        previous = self.previous(y)
        step = jax.vmap(self.stages.linearise)(previous, w, self.inputs)
        active = self.active
        if active is not None:
            # A step that is not made leaves the state as it is.
            identity = jnp.eye(y.shape[1], dtype=y.dtype)
            still = jtu.tree_map(jnp.zeros_like, step)
            still = eqx.tree_at(lambda step: step.matrix, still, jnp.broadcast_to(identity, step.matrix.shape))
            step = jtu.tree_map(lambda a, b: jnp.where(active.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), step, still)
        return (previous - y) + step.value, step

    def steps(self, previous: Float[Array, " N D"], inputs: PyTree, y: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """All steps from the given states, known to lead to about `y`."""
        if self.stages is None:
            return jax.vmap(self.step)(previous, inputs)
        y = jnp.where(jnp.all(jnp.isfinite(y), axis=1, keepdims=True), y, previous)
        guess = jax.vmap(self.stages.guess)(previous, y, inputs)
        return previous + jax.vmap(self.stages.solve)(previous, guess, inputs)

    @property
    def first_input(self) -> PyTree:
        """`x[0]`."""
        return jtu.tree_map(lambda x: x[0], self.inputs)

    def inputs_of(self, start: Int[ArrayLike, ""], count: int) -> PyTree:
        """The inputs of `count` steps from `start`; past the end, the last one's."""
        index = jnp.minimum(start + jnp.arange(count), self.length - 1)
        return jtu.tree_map(lambda x: x[index], self.inputs)

    def segment(
        self, start: Int[ArrayLike, ""], count: Int[ArrayLike, ""], init: Float[Array, " D"], capacity: int
    ) -> "Recurrence":
        """`count` steps from `start` as a recurrence of their own, in arrays for `capacity` steps.

        **Arguments:** the first step; their number; the state before them; how many there are room for.
        """
        if all(isinstance(x, int) for x in (start, count)) and (start, count, capacity) == (
            0,
            self.length,
            self.length,
        ):
            return self
        active = jnp.arange(capacity) < count
        inputs = self.inputs_of(start, capacity)
        return Recurrence(self.map, init, inputs, capacity, self.incremental, active, self.stages)

    def on(self, inputs: PyTree) -> "Recurrence":
        """The same steps with other inputs."""
        return Recurrence(self.map, self.init, inputs, self.length, self.incremental, self.active, self.stages)

    def guard(self, y: Float[Array, " N D"], finite: Bool[Array, " N"]) -> tuple[Float[Array, " N D"], PyTree]:
        """Arguments of every step, with those of steps that are not healthy replaced by the first step's.

        What is computed from them is finite wherever the first step is, so that a derivative which a `where` discards
        afterwards is zero and not `0 * nan`.
        """
        previous = jnp.where(finite[:, None], self.previous(y), self.init)

        def replace(x):
            return jnp.where(finite.reshape((-1,) + (1,) * (x.ndim - 1)), x, x[:1])

        return previous, jtu.tree_map(replace, self.inputs)
