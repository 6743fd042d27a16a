"""What small means: for an update, and for the defect of a step.

A maximum is no guard against NaN: XLA's reductions on the CPU drop it (jaxlib 0.10.2, arrays of a thousand entries and
more). Whatever decides about success asks for `isfinite` by name.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int


# A step's equation holds to rounding if its defect is at most this many epsilons of the state's size.
_ROUNDINGS = 8.0
_BLOCKS = 64


def first_failure(holds: Bool[Array, " N"]) -> Int[Array, ""]:
    """The number of leading entries that hold: the index of the first that does not, or `N`."""
    return jnp.where(jnp.all(holds), holds.shape[0], jnp.argmin(holds))


def _size_so_far(y: Float[Array, " N D"]) -> Float[Array, " N D"]:
    """The largest `|y[l, j]|` over `l <= i`, looking ahead by at most one of 64 blocks so that it costs no long scan."""
    num_steps, size = y.shape
    block = -(-num_steps // _BLOCKS)
    padded = jnp.pad(jnp.abs(y), ((0, block * _BLOCKS - num_steps), (0, 0)))
    largest = lax.cummax(jnp.max(padded.reshape(_BLOCKS, block, size), axis=1), axis=0)
    return jnp.repeat(largest, block, axis=0)[:num_steps]


class Tolerance(eqx.Module):
    """Compares updates and defects with the size that the solution has had so far.

    The scale of `y[i, j]` is the largest `|y[l, j]|` over `l <= i` (up to a block of 1/64 of all steps). Looking back
    makes a component that crosses zero no harder to solve for than its neighbours; not looking ahead keeps the start of
    a growing solution accurate.

    **Arguments:**

    - `rtol`, `atol`: an entry of an update is small if it is at most `atol + max(rtol, 4 eps) * scale`.
    - `norm`: a norm over one step's entries.
    - `eps`: what the dtype of the states resolves.
    """

    rtol: Float[ArrayLike, ""]
    atol: Float[ArrayLike, ""]
    norm: Callable = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def scale(self, y: Float[Array, " N D"]) -> Float[Array, " N D"]:
        """The size that each entry of `y` is compared with."""
        return _size_so_far(y)

    def error(self, d: Float[Array, " N D"], scale: Float[Array, " N D"]) -> Float[Array, " N"]:
        """The norm of each step's update in units of the tolerance; infinite where it is not finite."""
        tolerance = self.atol + jnp.maximum(self.rtol, 4 * self.eps) * scale
        scaled = jnp.where(d == 0, 0, jnp.abs(d) / tolerance.astype(d.dtype))
        error = jax.vmap(self.norm)(scaled)
        return jnp.where(jnp.all(jnp.isfinite(d), axis=1) & ~jnp.isnan(error), error, jnp.inf)

    def at_rounding(self, r: Float[Array, " N D"], scale: Float[Array, " N D"]) -> Bool[Array, " N"]:
        """Whether each step's equation holds to rounding. The rounding errors of a step are relative to the largest of
        its components, since a field mixes them."""
        size = jnp.max(scale, axis=1, keepdims=True)
        return jnp.all(jnp.abs(r) <= _ROUNDINGS * self.eps * size, axis=1)

    def resolved(self, d: Float[Array, " N D"], scale: Float[Array, " N D"]) -> Bool[Array, " N"]:
        """Whether each step's update is below half the digits of the dtype."""
        size = jnp.max(scale, axis=1, keepdims=True)
        return jnp.all(jnp.abs(d) <= self.eps**0.5 * size, axis=1)
