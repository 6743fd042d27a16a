"""Access along the time axis with little communication if that axis is spread over devices.

XLA's partitioner exchanges entries with the neighbouring device for a pad, and sums one masked entry over the devices for a
gather of it. For an equivalent concatenation, or slice at a traced index, it gathers the whole array. It makes an update in
place (`x.at[0].set`) of an unevenly spread array on every device (jaxlib 0.10.2), which is wrong: no such update is used
along time.
"""

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Int, PyTree, Shaped


def shift(x: Shaped[Array, "N *rest"], by: int = 1) -> Shaped[Array, "N *rest"]:
    """`x[i - by]` at `i`, zero beyond the ends: `0, x[0], ..., x[N-2]`, or `x[1], ..., x[N-1], 0` with `by=-1`."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(by, -by, 0)] + [(0, 0, 0)] * (x.ndim - 1))


def with_row(x: Shaped[Array, "N *rest"], index: int, row: Shaped[ArrayLike, "*#rest"]) -> Shaped[Array, "N *rest"]:
    """`x` with the entry at `index` replaced by `row`."""
    here = jnp.arange(x.shape[0]) == index % x.shape[0]
    return jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), jnp.asarray(row, x.dtype), x)


def preceded_by(first: Shaped[ArrayLike, "*#rest"], x: Shaped[Array, "N *rest"]) -> Shaped[Array, "N *rest"]:
    """`first, x[0], ..., x[N-2]`."""
    return with_row(shift(x), 0, first)


def row_at(x: Shaped[Array, "N *rest"], index: Int[ArrayLike, ""]) -> Shaped[Array, "*rest"]:
    """`x[index]` for a non-negative index; the last entry if `index` is beyond the end."""
    return x[jnp.minimum(jnp.asarray(index), x.shape[0] - 1)[None]][0]


def flipped(tree: PyTree[Array]) -> PyTree[Array]:
    """The steps in reverse order. (Arrays spread over devices would be gathered: do not use it there.)"""
    return jtu.tree_map(lambda x: jnp.flip(x, axis=0), tree)
