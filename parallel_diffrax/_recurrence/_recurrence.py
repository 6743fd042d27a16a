"""A nonlinear recurrence, and the system of equations that it is."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree


class Recurrence(eqx.Module):
    """`y[i] = F(y[i-1], x[i])`, `y[-1] = init`, `i = 0 .. N-1`: all steps of something sequential, as one object.

    A pytree in everything that can be differentiated: what `map` closes over, `init` and `inputs`.

    **Arguments:**

    - `map`: `F`, from a state of shape `(D,)` and one element of `inputs` to a state of shape `(D,)`; or the increment
        `F(y, x) - y`.
    - `init`: the state before the first step, shape `(D,)`.
    - `inputs`: any pytree of arrays whose leading axis is the `N` steps.
    - `length`: `N`.
    - `active`: the steps that are made, or `None` for all; the others of a `stretch` leave the state as it is.
    - `incremental`: whether `map` is the increment. A residual is then `(y[i-1] - y[i]) + increment`, whose rounding error
        is relative to the increment and not to the state: the root is found to the last digit of the dtype, and errors
        of the steps do not add up as they do in sequence.
    """

    map: Callable[[Float[Array, " D"], PyTree], Float[Array, " D"]]
    init: Float[Array, " D"]
    inputs: PyTree
    length: int = eqx.field(static=True)
    incremental: bool = eqx.field(static=True, default=False)
    active: Bool[Array, " N"] | None = None

    @classmethod
    def make(cls, map, init, inputs, length, incremental=False) -> "Recurrence":
        """As the constructor, after moving every array that `map` closes over into the pytree.

        Without that, a traced array in a closure would be lost to the derivative.
        """
        first = jtu.tree_map(lambda x: x[0], inputs)
        return cls(eqx.filter_closure_convert(map, init, first), init, inputs, length, incremental)

    def step(self, y: Float[Array, " D"], x: PyTree) -> Float[Array, " D"]:
        """`F(y, x)`, one step."""
        return y + self.map(y, x) if self.incremental else self.map(y, x)

    def previous(self, y: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """The states that the steps start from: `init, y[0], ..., y[N-2]`."""
        return jnp.concatenate([self.init[None], y[:-1]])

    def residual(self, y: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """`r[i] = F(y[i-1], x[i]) - y[i]`, zero at the solution."""
        previous = self.previous(y)
        mapped = jax.vmap(self.map)(previous, self.inputs)
        if self.active is not None:
            mapped = jnp.where(self.active[:, None], mapped, 0 if self.incremental else previous)
        return (previous - y) + mapped if self.incremental else mapped - y

    def inputs_of(self, start: Int[ArrayLike, ""], count: int) -> PyTree:
        """The inputs of `count` steps from `start`; past the end, the last one's."""
        index = jnp.minimum(start + jnp.arange(count), self.length - 1)
        return jtu.tree_map(lambda x: x[index], self.inputs)

    def stretch(
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
        return Recurrence(self.map, init, self.inputs_of(start, capacity), capacity, self.incremental, active)

    def guard(self, y: Float[Array, " N D"], healthy: Bool[Array, " N"]) -> tuple[Float[Array, " N D"], PyTree]:
        """Arguments of every step, with those of steps that are not healthy replaced by the first step's.

        What is computed from them is finite wherever the first step is, so that a derivative which a `where` discards
        afterwards is zero and not `0 * nan`.
        """
        previous = jnp.where(healthy[:, None], self.previous(y), self.init)

        def replace(x):
            return jnp.where(healthy.reshape((-1,) + (1,) * (x.ndim - 1)), x, x[:1])

        return previous, jtu.tree_map(replace, self.inputs)
