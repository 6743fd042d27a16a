"""Looks along the time axis that cost no communication to speak of where that axis is spread over devices.

XLA's partitioner exchanges rows with the neighbouring device for a pad, and sums one masked row over the devices for a
gather of it. For the concatenation, or the slice at a traced index, that says the same, it gathers the whole array. And an
update in place (`x.at[0].set`) of an array that is spread unevenly is made on every device (jaxlib 0.10.2), which is wrong:
no such is used along time.
"""

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Int, PyTree, Shaped


def shift(x: Shaped[Array, "N *rest"], by: int = 1) -> Shaped[Array, "N *rest"]:
    """`x[i - by]` at `i`, zero beyond the ends: `0, x[0], ..., x[N-2]`, or with `by=-1` `x[1], ..., x[N-1], 0`."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(by, -by, 0)] + [(0, 0, 0)] * (x.ndim - 1))


def with_row(x: Shaped[Array, "N *rest"], index: int, row: Shaped[ArrayLike, "*#rest"]) -> Shaped[Array, "N *rest"]:
    """`x` with this row at `index`."""
    here = jnp.arange(x.shape[0]) == index % x.shape[0]
    return jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), jnp.asarray(row, x.dtype), x)


def preceded_by(first: Shaped[ArrayLike, "*#rest"], x: Shaped[Array, "N *rest"]) -> Shaped[Array, "N *rest"]:
    """`first, x[0], ..., x[N-2]`."""
    return with_row(shift(x), 0, first)


def row_at(x: Shaped[Array, "N *rest"], index: Int[ArrayLike, ""]) -> Shaped[Array, "*rest"]:
    """`x[index]`, for an index that is not negative; beyond the end, the last."""
    return x[jnp.minimum(jnp.asarray(index), x.shape[0] - 1)[None]][0]


def flipped(tree: PyTree[Array]) -> PyTree[Array]:
    """The steps in reverse order. (Not for what is spread over devices, which would be gathered.)"""
    return jtu.tree_map(lambda x: jnp.flip(x, axis=0), tree)
