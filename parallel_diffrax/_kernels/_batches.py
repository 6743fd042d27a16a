"""Programs that depend on the size of the batch, which is known only after they are traced."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int


# With several devices, larger batches are left to XLA, which divides them among the devices. A kernel repeats them on each.
_LARGEST_REPEATED_BATCH = 512


def by_batch_size(choose: Callable[[int], Callable], size: int = 1) -> Callable:
    """A function that is `choose(n)` in a batch of `n` members, over all axes of nested `jax.vmap`. The results of all
    choices must be alike, and none may close over traced arrays.

    A batch axis is known only when `jax.vmap` is applied, after the function was traced. `choose(1)` is always traced.
    """

    @jax.custom_batching.custom_vmap
    def run(*args):
        return choose(size)(*args)

    @run.def_vmap
    def _(axis_size, in_batched, *args):
        axes = tuple(jtu.tree_map(lambda batched: 0 if batched else None, in_batched))
        wide = lambda n: jax.vmap(choose(n), in_axes=axes, axis_size=axis_size)
        outs = by_batch_size(wide, size * axis_size)(*args)
        return outs, jtu.tree_map(lambda _: True, outs)

    return run


@jax.custom_batching.custom_vmap
def any_member(x: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether `x` holds for any member of a batch. It has no axis of the batch: under `jax.vmap`, only a condition without
    one lets a branch be skipped, and a loop go on without a copy of all that it carries."""
    return x


@any_member.def_vmap
def _(axis_size, in_batched, x):
    del axis_size
    return any_member(jnp.any(x, axis=0) if in_batched[0] else x), False


@jax.custom_batching.custom_vmap
def largest_member(x: Int[Array, ""]) -> Int[Array, ""]:
    """The largest `x` of all members of a batch, without an axis of the batch."""
    return x


@largest_member.def_vmap
def _(axis_size, in_batched, x):
    del axis_size
    return largest_member(jnp.max(x, axis=0) if in_batched[0] else x), False


def in_batches(kernel: Callable, otherwise: Callable) -> Callable:
    """`kernel`; with several devices, in large batches, `otherwise`, with the same arguments. Neither may close over traced
    arrays."""
    if jax.device_count() == 1:
        return kernel
    return by_batch_size(lambda size: otherwise if repeats(size) else kernel)


def repeats(size: int) -> bool:
    """Whether a batch of this size is left to XLA, since every device would repeat all of it in a kernel."""
    return jax.device_count() > 1 and size > _LARGEST_REPEATED_BATCH
