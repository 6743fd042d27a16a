"""Segments: runs of consecutive steps of equal length into which a sequence is cut.

A sequence of `N` steps becomes an array of shape `(M, n, ...)`: `M` segments of `n` steps, the last one padded. Sequences
may be spread over several devices: see `_shifts.py` for which operations XLA then partitions well.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ._shifts import shift


# Number of segments of a running sum.
_SUMS = 512


def segment_length(num_steps: int, most: int) -> int:
    """The length of the segments if there are at most `most`."""
    return -(-num_steps // most)


def num_segments(num_steps: int, most: int) -> int:
    """The number of segments, at most `most`. The last may be shorter than the others."""
    return -(-num_steps // segment_length(num_steps, most))


def split_segments(
    x: Shaped[Array, " N *D"],
    most: int | None = None,
    *,
    length: int | None = None,
    fill: Shaped[Array, " *D"] | Literal["zeros", "last"] = "zeros",
) -> Shaped[Array, " M n *D"]:
    """Cuts a sequence into at most `most` segments of equal length, or into segments of `length` steps.

    `fill` pads the last segment: zeros, copies of the last entry, or copies of a given entry. Only zeros add no
    concatenation, which matters for sequences that are spread over devices.
    """
    num_steps = x.shape[0]
    if length is None:
        assert most is not None
        length = segment_length(num_steps, most)
    count = -(-num_steps // length)
    missing = count * length - num_steps
    if isinstance(fill, str):
        widths = [(0, missing)] + [(0, 0)] * (x.ndim - 1)
        x = jnp.pad(x, widths, mode="constant" if fill == "zeros" else "edge")
    else:
        x = jnp.concatenate([x, jnp.broadcast_to(fill, (missing, *x.shape[1:]))])
    return x.reshape(count, length, *x.shape[1:])


def join_segments(x: Shaped[Array, " M n *D"], num_steps: int) -> Shaped[Array, " N *D"]:
    """The inverse of `split_segments`: drops the padding."""
    return x.reshape(-1, *x.shape[2:])[:num_steps]


def repeat_segments(x: Shaped[Array, " M *D"], num_steps: int, most: int) -> Shaped[Array, " N *D"]:
    """Repeats each segment's value for its steps."""
    return jnp.repeat(x, segment_length(num_steps, most), axis=0)[:num_steps]


def segment_maxima(x: Float[Array, " N *D"], most: int) -> Float[Array, " M *D"]:
    """The maximum of non-negative numbers in each segment."""
    return jnp.max(split_segments(x, most), axis=1)


def running_sum(x: Float[Array, " N *D"]) -> Float[Array, " N *D"]:
    """The sum of all entries up to each one: first within segments, then over segments. (`jnp.cumsum` gathers a sequence
    that is spread over devices.)"""
    sums = jnp.cumsum(split_segments(x, _SUMS), axis=1)
    before = shift(jnp.cumsum(sums[:, -1], axis=0))
    return join_segments(sums + before[:, None], x.shape[0])
