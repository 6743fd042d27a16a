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

from .._scan import AbstractTransitions, preceded_by, shift, with_row
from ._segments import running_sum


# A step's equation holds to rounding if its defect is at most this many epsilons of the state's size.
_ROUNDINGS = 8.0
_BLOCKS = 64
_CANCELLED = 1e-4


def num_leading_true(satisfied: Bool[Array, " N"]) -> Int[Array, ""]:
    """The number of leading entries that hold: the index of the first that does not, or `N`."""
    # A minimum, since XLA takes seconds to fold an `argmin` over what is known to hold.
    return jnp.min(jnp.where(satisfied, satisfied.shape[0], jnp.arange(satisfied.shape[0])))


def _size_so_far(y: Float[Array, " N D"]) -> Float[Array, " N D"]:
    """The largest `|y[l, j]|` over `l <= i`: of the last 32 steps and of all earlier blocks of `N / 64` steps, which
    costs no long scan. It never looks ahead: one wild state must not excuse those before it."""
    num_steps, size = y.shape
    block = -(-num_steps // _BLOCKS)

    def cut(x):
        return jnp.pad(x, ((0, block * _BLOCKS - num_steps), (0, 0))).reshape(_BLOCKS, block, size)

    magnitude = jnp.abs(y)
    largest = lax.cummax(jnp.max(cut(magnitude), axis=1), axis=0)
    before = shift(largest)
    for by in (1, 2, 4, 8, 16):
        if by < num_steps:
            magnitude = jnp.maximum(magnitude, shift(magnitude, by))
    return jnp.maximum(cut(magnitude), before[:, None]).reshape(-1, size)[:num_steps]


class Tolerance(eqx.Module):
    """Compares updates and defects with the size that the solution has had so far.

    The scale of `y[i, j]` is the largest `|y[l, j]|` over `l <= i` (as far as is cheap to know). Looking back makes a
    component that crosses zero no harder to solve for than its neighbours; not looking ahead keeps the start of a growing
    solution accurate.

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

    def at_rounding(self, r: Float[Array, " N D"], size: Float[Array, " N D"]) -> Bool[Array, " N"]:
        """Whether each step's equation holds to rounding: `size` is that of the numbers that went into each entry."""
        return jnp.all(jnp.abs(r) <= _ROUNDINGS * self.eps * size, axis=1)

    def resolved(
        self, d: Float[Array, " N D"], scale: Float[Array, " N D"], size: Float[Array, " N D"]
    ) -> Bool[Array, " N"]:
        """Whether each step's update is below half the digits of the dtype; or is rounding, in a component that is zero but
        for that of the numbers it is computed from, which have this `size`."""
        return jnp.all((jnp.abs(d) <= self.eps**0.5 * scale) | self.noise(d, size), axis=1)

    def noise(self, d: Float[Array, " N D"], size: Float[Array, " N D"]) -> Bool[Array, " N D"]:
        """Whether each entry of an update is rounding of the numbers that it was computed from."""
        return jnp.abs(d) <= 8 * _ROUNDINGS * self.eps * size

    def satisfied(
        self, r: Float[Array, " N D"], scale: Float[Array, " N D"], size: Float[Array, " N D"]
    ) -> Bool[Array, " N"]:
        """Whether the equations of all steps up to each hold: every one to rounding, or all that do not add up to a
        small error. (One by one, `N` errors of the size of the tolerance could be far from any solution.)"""
        rounding = jnp.abs(r) <= _ROUNDINGS * self.eps * size
        excess = running_sum(jnp.where(rounding, 0, jnp.abs(r)))
        return self.error(excess, scale) <= 1


def effective_scale(scale: Float[Array, " N D"], size: Float[Array, " N D"]) -> Float[Array, " N D"]:
    """The size that updates are compared with where `size` is that of the numbers which entries are computed from: a
    component of which less than 1/10000 is left (one that is zero by symmetry, of which rounding is left) has that."""
    return jnp.maximum(scale, _CANCELLED * size)


def rounding_size(transitions: AbstractTransitions, scale: Float[Array, " N D"]) -> Float[Array, " N D"]:
    """The size of the numbers that each entry of a step is computed from: its own, and those of the components that it
    depends on, times how much. A large component that it does not depend on has no part in its rounding."""
    mixed = transitions.abs().apply(preceded_by(scale[0], scale))
    # The first step depends on no unknown; what it mixes is taken to be what the second does.
    mixed = with_row(mixed, 0, mixed[min(1, mixed.shape[0] - 1)])
    return jnp.maximum(scale, jnp.where(jnp.isfinite(mixed), mixed, 0))
