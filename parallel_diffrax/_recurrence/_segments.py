"""A sequence looked at in segments of equal length."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._scan import shift


# Running sums are taken in so many segments.
_SUMS = 512


def segment_length(num_steps: int, most: int) -> int:
    """The length of the segments, if there are at most so many."""
    return -(-num_steps // most)


def num_segments(num_steps: int, most: int) -> int:
    """The number of segments, at most `most`; the last may be shorter."""
    return -(-num_steps // segment_length(num_steps, most))


def split_segments(x: Float[Array, " N *D"], most: int) -> Float[Array, " M n *D"]:
    """The sequence in at most so many segments, the last padded with zeros."""
    num_steps = x.shape[0]
    length, count = segment_length(num_steps, most), num_segments(num_steps, most)
    return jnp.pad(x, [(0, count * length - num_steps)] + [(0, 0)] * (x.ndim - 1)).reshape(count, length, *x.shape[1:])


def segment_maxima(x: Float[Array, " N *D"], most: int) -> Float[Array, " M *D"]:
    """The largest of non-negative numbers in each segment."""
    return jnp.max(split_segments(x, most), axis=1)


def running_sum(x: Float[Array, " N *D"]) -> Float[Array, " N *D"]:
    """The sum of all entries up to each: within segments first, then of segments. (`jnp.cumsum` gathers a sequence that is
    spread over devices.)"""
    sums = jnp.cumsum(split_segments(x, _SUMS), axis=1)
    before = shift(jnp.cumsum(sums[:, -1], axis=0))
    return (sums + before[:, None]).reshape(-1, *x.shape[1:])[: x.shape[0]]


def repeat_segments(x: Shaped[Array, " M *D"], num_steps: int, most: int) -> Shaped[Array, " N *D"]:
    """What holds of a segment for all of its steps."""
    return jnp.repeat(x, segment_length(num_steps, most), axis=0)[:num_steps]
