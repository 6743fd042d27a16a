"""All outputs of a window, written at once."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ._interpolation import WindowInterpolation


class Reserved(eqx.Module):
    """Places in the buffers of one `SubSaveAt` for the outputs of one window.

    **Attributes:** `slot`, the first place; `first` and `stop`, which of the requested times are to be saved there, the
    latter not included.
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
    """Saves `fn(t, y(t), args)` for every requested time that lies in the window, all at once.

    **Arguments:**

    - `fn`, `requested`: of a `diffrax.SubSaveAt`.
    - `buffers`: the times and values saved so far.
    - `reserved`: where to put them.
    - `window`: the solution.
    - `limit`: the time up to which it counts; values that are written for later ones mean nothing (`discard_after`).
    - `y0`: the state at the start of the window, which stands in for times that are later or lie in other windows.
    - `args`: of the solve.

    **Returns:** the buffers. Cost: `M` evaluations of the local interpolant, in parallel, whatever their number in this
    window.
    """
    count = requested.shape[0]
    index = jnp.arange(count)
    wanted = (index >= reserved.first) & (index < reserved.stop)
    # Neither the interpolant nor `fn` may see a time or a state outside: their values would be dropped, but the derivative
    # of what is dropped is zero times what may be infinite.
    inside = wanted & (requested <= limit)

    def output(inside, t):
        y = jtu.tree_map(lambda y, start: jnp.where(inside, y, start), window.evaluate(t), y0)
        return fn(t, y, args)

    outputs = (requested, jax.vmap(output)(inside, jnp.where(inside, requested, window.t0)))
    # The reserved places are those of consecutive requested times: shift all of them there, and keep what was.
    begin = jnp.asarray(reserved.slot) - reserved.first

    def write(buffer, values):
        before = lax.dynamic_slice_in_dim(buffer, begin, count)
        chosen = jnp.where(wanted.reshape((-1,) + (1,) * (values.ndim - 1)), values.astype(buffer.dtype), before)
        return lax.dynamic_update_slice_in_dim(buffer, chosen, begin, axis=0)

    return jtu.tree_map(write, buffers, outputs)


def discard_after(
    t: Float[Array, ""],
    buffers: tuple[Float[Array, " B"], PyTree],
    saved: Int[ArrayLike, ""],
    empty: tuple[Float[Array, " B"], PyTree],
) -> tuple[tuple[Float[Array, " B"], PyTree], Int[Array, ""]]:
    """Takes back what was saved at times after `t`.

    **Arguments:** the time; the times and values saved so far; their number; what the buffers held at first.

    **Returns:** the buffers, and how many entries there are left.
    """
    late = (buffers[0] > t) & (jnp.arange(buffers[0].shape[0]) < saved)

    def clear(buffer, empty):
        return jnp.where(late.reshape((-1,) + (1,) * (buffer.ndim - 1)), empty, buffer)

    return jtu.tree_map(clear, buffers, empty), jnp.asarray(saved - jnp.sum(late))
