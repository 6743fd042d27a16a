"""A scan in blocks: reduce each, scan the carries, replay."""

import functools as ft
import itertools

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from ._abstract_scan import AbstractScan
from ._arguments import check_instance, check_integer
from ._kogge_stone_scan import KoggeStoneScan
from ._shifts import flipped, shift


class BlockedScan(AbstractScan):
    """Blocks of `radix` elements, all at once: the product of each; the scan of these products, in blocks again; and the
    elements of each block once more, from the result of the blocks before.

    A linear recurrence replays vectors only, so that matrices are multiplied half as often as by `AssociativeScan`, and
    written back once in `radix`: fastest on a GPU where memory bandwidth counts.

    Work `N (1 + 1 / radix + ...)` compositions and as many applications to vectors, depth `2 radix log N / log radix`,
    memory `2 / radix` of the elements besides.

    **Arguments:**

    - `radix`: the number of elements in a block, at least 2.
    - `num_carries`: so many carries, or fewer, are combined by the next scan.
    - `carries`: that scan.
    """

    radix: int = eqx.field(static=True, default=8)
    num_carries: int = eqx.field(static=True, default=4096)
    carries: AbstractScan = KoggeStoneScan()

    def __check_init__(self):
        check_integer("BlockedScan", "radix", self.radix, "the number of elements in a block", least=2)
        check_integer("BlockedScan", "num_carries", self.num_carries, "the largest number of carries of the next scan")
        check_instance("BlockedScan", "carries", self.carries, AbstractScan, "KoggeStoneScan()")

    def prefix(self, compose, elements, *, reverse=False):
        if reverse:
            return flipped(self.prefix(compose, flipped(elements)))
        num_steps = jtu.tree_leaves(elements)[0].shape[0]
        if num_steps <= self.num_carries:
            return self.carries.prefix(compose, elements)
        first, *rest = self._cut(elements, num_steps)
        total = ft.reduce(compose, rest, first)
        before = self.prefix(compose, jtu.tree_map(lambda x: x[:-1], total))
        # Nothing comes before the first block.
        product = jtu.tree_map(
            lambda a, b: jnp.concatenate([a[:1], b]),
            first,
            compose(before, jtu.tree_map(lambda x: x[1:], first)),
        )
        products = itertools.accumulate(rest, compose, initial=product)
        return jtu.tree_map(lambda *xs: _joined(xs, num_steps), *products)

    def linear(self, transitions, r, *, reverse=False):
        if reverse:
            return flipped(self.linear(*flipped((transitions, r))))
        num_steps = r.shape[0]
        if num_steps <= self.num_carries:
            return self.carries.linear(transitions, r)
        # It is multiplied by the zero before the beginning.
        transitions = transitions.where(jnp.arange(num_steps) > 0)
        blocks = self._cut((transitions, r), num_steps)
        product, d = blocks[0]
        for A, b in blocks[1:]:
            d = A.apply(d) + b
            product = A.after(product)
        d = shift(self.linear(product, d))
        ds = itertools.accumulate(blocks, lambda d, block: block[0].apply(d) + block[1], initial=d)
        return _joined(list(ds)[1:], num_steps)

    def _cut(self, elements, num_steps):
        """The first elements of all blocks, the second ones, and so on; the last block is filled up with copies of its
        last, of which nothing is kept."""
        count = -(-num_steps // self.radix)

        def cut(x):
            x = jnp.pad(x, [(0, count * self.radix - num_steps)] + [(0, 0)] * (x.ndim - 1), mode="edge")
            return x.reshape(count, self.radix, *x.shape[1:])

        cut_elements = jtu.tree_map(cut, elements)
        return [jtu.tree_map(lambda x, k=k: x[:, k], cut_elements) for k in range(self.radix)]


def _joined(parts, num_steps):
    """The inverse of `_cut`, for one array."""
    x = jnp.stack(parts, axis=1)
    return x.reshape(-1, *x.shape[2:])[:num_steps]
