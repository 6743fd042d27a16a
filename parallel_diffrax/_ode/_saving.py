"""Writes all outputs of a window at once."""

from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ._interpolation import WindowInterpolation


def requests(saveat: dfx.SaveAt) -> list[dfx.SubSaveAt]:
    """The parts of what a solve is asked to save."""
    return jtu.tree_leaves(saveat.subs, is_leaf=lambda x: isinstance(x, dfx.SubSaveAt))


class Reserved(eqx.Module):
    """Where the buffers of one `SubSaveAt` take the outputs of one window: from `slot` on, the requested times with indices
    from `first` up to `stop`, exclusive."""

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
    """Saves `fn(t, y(t), args)` in the `buffers` of times and values, for all requested times in the window at once.

    It evaluates the local interpolant at all `M` requested times, however many are in this window. Values saved for times
    after `limit` are meaningless (see `discard_after`). `y0`, the state at the start of the window, replaces the state there
    and in other windows.
    """
    count = requested.shape[0]
    index = jnp.arange(count)
    slot, first, stop = (jnp.asarray(x, index.dtype) for x in (reserved.slot, reserved.first, reserved.stop))
    wanted = (index >= first) & (index < stop)
    # Neither the interpolant nor `fn` may see a time or a state outside. Its value would be discarded, but the derivative of
    # a discarded value is zero times a number that may be infinite.
    inside = wanted & (requested <= limit)

    def output(inside, t):
        # The interpolant of a state in float32 may be evaluated in the float64 of times.
        y = jtu.tree_map(lambda y, start: jnp.where(inside, y, jnp.asarray(start, y.dtype)), window.evaluate(t), y0)
        return fn(t, y, args)

    outputs = (requested, jax.vmap(output)(inside, jnp.where(inside, requested, window.t0)))

    # The reserved slots are for consecutive requested times: write all outputs at that offset, and keep the other entries.
    def write(buffer, values):
        kept = lax.dynamic_slice_in_dim(buffer, slot - first, count)
        chosen = jnp.where(wanted.reshape((-1,) + (1,) * (values.ndim - 1)), values.astype(buffer.dtype), kept)
        return lax.dynamic_update_slice_in_dim(buffer, chosen, slot - first, axis=0)

    return jtu.tree_map(write, buffers, outputs)


def discard_after(
    t: Float[Array, ""],
    buffers: tuple[Float[Array, " B"], PyTree],
    saved: Int[ArrayLike, ""],
    empty: tuple[Float[Array, " B"], PyTree],
) -> tuple[tuple[Float[Array, " B"], PyTree], Int[Array, ""]]:
    """Replaces those of the `saved` outputs with times after `t` by the `empty` buffers. Returns the buffers, and the number
    of remaining outputs."""
    late = (buffers[0] > t) & (jnp.arange(buffers[0].shape[0]) < saved)

    def clear(buffer, empty):
        return jnp.where(late.reshape((-1,) + (1,) * (buffer.ndim - 1)), empty, buffer)

    return jtu.tree_map(clear, buffers, empty), jnp.asarray(saved - jnp.sum(late, dtype=jnp.result_type(saved)))
