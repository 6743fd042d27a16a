"""A sequence looked at in stretches of equal length."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._scan import later


# Running sums are taken in so many stretches.
_SUMS = 512


def stretch_length(num_steps: int, most: int) -> int:
    """The length of the stretches, if there are at most so many."""
    return -(-num_steps // most)


def num_stretches(num_steps: int, most: int) -> int:
    """The number of stretches, at most `most`; the last may be shorter."""
    return -(-num_steps // stretch_length(num_steps, most))


def cut(x: Float[Array, " N *D"], most: int) -> Float[Array, " M n *D"]:
    """The sequence in at most so many stretches, the last padded with zeros."""
    num_steps = x.shape[0]
    length, count = stretch_length(num_steps, most), num_stretches(num_steps, most)
    return jnp.pad(x, [(0, count * length - num_steps)] + [(0, 0)] * (x.ndim - 1)).reshape(count, length, *x.shape[1:])


def stretch_maxima(x: Float[Array, " N *D"], most: int) -> Float[Array, " M *D"]:
    """The largest of non-negative numbers in each stretch."""
    return jnp.max(cut(x, most), axis=1)


def running_sum(x: Float[Array, " N *D"]) -> Float[Array, " N *D"]:
    """The sum of all entries up to each: within stretches first, then of stretches. (`jnp.cumsum` gathers a sequence that is
    spread over devices.)"""
    sums = jnp.cumsum(cut(x, _SUMS), axis=1)
    before = later(jnp.cumsum(sums[:, -1], axis=0))
    return (sums + before[:, None]).reshape(-1, *x.shape[1:])[: x.shape[0]]


def spread(x: Shaped[Array, " M *D"], num_steps: int, most: int) -> Shaped[Array, " N *D"]:
    """What holds of a stretch for all of its steps."""
    return jnp.repeat(x, stretch_length(num_steps, most), axis=0)[:num_steps]
