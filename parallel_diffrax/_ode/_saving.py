"""Writes all outputs of a window at once."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ._interpolation import WindowInterpolation


class Reserved(eqx.Module):
    """The slots in the buffers of one `SubSaveAt` that the outputs of one window take.

    **Attributes:** `slot`, the first slot; `first` and `stop`, the range of requested times to save there, without `stop`.
    """

    slot: Int[ArrayLike, ""]
    first: Int[ArrayLike, ""]
    stop: Int[ArrayLike, ""]


def write_outputs(
    fn: Callable,
    requested: Float[Array, " M"],
    buffers: tuple[Float[Array, " B"], PyTree],
    reserved: Reserved,
    window: WindowInterpolation,
    limit: Float[ArrayLike, ""],
    y0: PyTree,
    args: PyTree,
) -> tuple[Float[Array, " B"], PyTree]:
    """Saves `fn(t, y(t), args)` for all requested times in the window at once.

    **Arguments:**

    - `fn`, `requested`: the `fn` and `ts` of a `diffrax.SubSaveAt`.
    - `buffers`: the times and values saved so far.
    - `reserved`: the slots for the outputs.
    - `window`: the dense output.
    - `limit`: the last valid time. Values saved for later times are meaningless (see `discard_after`).
    - `y0`: the state at the start of the window. It replaces the state at times beyond `limit` or in other windows.
    - `args`: the arguments of the solve.

    **Returns:** the buffers.

    **Cost:** `M` evaluations of the local interpolant in parallel, for any number of requested times in this window.
    """
    count = requested.shape[0]
    index = jnp.arange(count)
    wanted = (index >= reserved.first) & (index < reserved.stop)
    # Neither the interpolant nor `fn` may see a time or a state outside. Its value would be discarded, but the derivative of
    # a discarded value is zero times a number that may be infinite.
    inside = wanted & (requested <= limit)

    def output(inside, t):
        y = jtu.tree_map(lambda y, start: jnp.where(inside, y, start), window.evaluate(t), y0)
        return fn(t, y, args)

    outputs = (requested, jax.vmap(output)(inside, jnp.where(inside, requested, window.t0)))
    # The reserved slots are for consecutive requested times: write all outputs at that offset, and keep the other entries.
    offset = jnp.asarray(reserved.slot) - reserved.first

    def write(buffer, values):
        kept = lax.dynamic_slice_in_dim(buffer, offset, count)
        chosen = jnp.where(wanted.reshape((-1,) + (1,) * (values.ndim - 1)), values.astype(buffer.dtype), kept)
        return lax.dynamic_update_slice_in_dim(buffer, chosen, offset, axis=0)

    return jtu.tree_map(write, buffers, outputs)


def discard_after(
    t: Float[Array, ""],
    buffers: tuple[Float[Array, " B"], PyTree],
    saved: Int[ArrayLike, ""],
    empty: tuple[Float[Array, " B"], PyTree],
) -> tuple[tuple[Float[Array, " B"], PyTree], Int[Array, ""]]:
    """Removes the outputs that were saved at times after `t`.

    **Arguments:** the time; the times and values saved so far; their number; the initial buffers.

    **Returns:** the buffers, and the number of remaining entries.
    """
    late = (buffers[0] > t) & (jnp.arange(buffers[0].shape[0]) < saved)

    def clear(buffer, empty):
        return jnp.where(late.reshape((-1,) + (1,) * (buffer.ndim - 1)), empty, buffer)

    return jtu.tree_map(clear, buffers, empty), jnp.asarray(saved - jnp.sum(late))
