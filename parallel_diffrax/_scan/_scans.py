"""Scans in plain JAX: every way evaluates the same recurrence."""

import functools as ft
import itertools

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._abstract_scan import AbstractScan
from ._arguments import check_instance, check_integer
from ._segments import join_segments, split_segments
from ._shifts import flipped, shift


class SequentialScan(AbstractScan):
    """`jax.lax.scan`, one step after the other. The reference for the other scans.

    Use it on a CPU, where it is fastest for short sequences. It does the least work.

    **Cost:** work `N` compositions, or `N D^2` (dense) or `N D` (diagonal) in a linear recurrence, which carries only the
    vector; depth `N`.
    """

    def prefix(self, compose, elements, *, reverse=False):
        first, others = _begin(elements, reverse)
        _, rest = lax.scan(lambda product, element: (compose(product, element),) * 2, first, others, reverse=reverse)
        return _join(first, rest, reverse)

    def linear(self, transitions, r, *, reverse=False):
        def body(d, element):
            A, r = element
            d = A.apply(d) + r
            return d, d

        # The first matrix multiplies zero and may hold anything.
        (_, first), others = _begin((transitions, r), reverse)
        _, rest = lax.scan(body, first, others, reverse=reverse)
        return _join(first, rest, reverse)


def _begin(elements, reverse: bool):
    """The element from which a scan starts, and the others."""
    first = jtu.tree_map(lambda x: x[-1 if reverse else 0], elements)
    return first, jtu.tree_map(lambda x: x[:-1] if reverse else x[1:], elements)


def _join(first, rest, reverse: bool):
    def join(first, rest):
        return jnp.concatenate([rest, first[None]] if reverse else [first[None], rest])

    return jtu.tree_map(join, first, rest)


class AssociativeScan(AbstractScan):
    """`jax.lax.associative_scan`. Use it on accelerators for large states.

    **Cost:** work `2 N` compositions (in a linear recurrence: `N D^3` dense, `N D` diagonal); depth `2 log2 N`; memory about
    three times the elements.

    ??? cite "Reference"

        Blelloch, "Prefix sums and their applications", Carnegie Mellon University, CMU-CS-90-190 (1990).
    """

    def prefix(self, compose, elements, *, reverse=False):
        # `compose` needs no `vmap`: it broadcasts over leading axes.
        return lax.associative_scan(compose, elements, reverse=reverse)


class KoggeStoneScan(AbstractScan):
    """Composes every element with the one `s` places before it, for the distances `s = 1, 2, 4, ...`.

    Use it on a GPU as long as launches cost more than arithmetic. XLA compiles each of its `log2 N` levels into one or two
    kernels; `AssociativeScan` has twice as many levels, of several kernels each. It also compiles fastest.

    **Cost:** work `N log2 N` compositions; depth `log2 N`; memory twice the elements.

    ??? cite "Reference"

        Kogge and Stone, "A parallel algorithm for the efficient solution of a general class of recurrence equations",
        IEEE Transactions on Computers C-22 (1973).
    """

    def prefix(self, compose, elements, *, reverse=False):
        if reverse:
            return flipped(self.prefix(compose, flipped(elements)))
        num_steps, distance = jtu.tree_leaves(elements)[0].shape[0], 1
        while distance < num_steps:
            # The first `distance` products are complete.
            head, first, then = (
                jtu.tree_map(lambda x, part=part: x[part], elements)
                for part in (slice(distance), slice(-distance), slice(distance, None))
            )
            elements = jtu.tree_map(lambda a, b: jnp.concatenate([a, b]), head, compose(first, then))
            distance *= 2
        return elements

    def linear(self, transitions, r, *, reverse=False):
        num_steps, distance = r.shape[0], 1
        # The first matrix multiplies zeros from before the beginning and may hold anything.
        index = jnp.arange(num_steps)
        transitions = transitions.where(index < num_steps - 1 if reverse else index > 0)
        while distance < num_steps:
            # XLA fuses a shift into the operation that reads it: it needs no kernel of its own.
            by = -distance if reverse else distance
            r_before, before = jtu.tree_map(lambda x, by=by: shift(x, by), (r, transitions))
            r = transitions.apply(r_before) + r
            transitions = transitions.after(before) if 2 * distance < num_steps else transitions
            distance *= 2
        return r


class BlockedScan(AbstractScan):
    """Scans blocks of `radix` elements in parallel.

    Use it on a GPU where memory bandwidth limits the speed. In a linear recurrence it replays vectors only. It multiplies
    matrices half as often as `AssociativeScan`, and writes back one product per `radix` matrices.

    The scan has three parts: the product of each block; the scan of these products, the carries, again in blocks; and the
    elements of each block again, starting from the result of the blocks before.

    **Arguments:** `radix`, the number of elements in a block, at least 2; `num_carries`, the largest number of elements of
    the last level; `carries`, the scan of that level.

    **Cost:** work `N (1 + 1 / radix + ...)` compositions, and as many applications to vectors; depth
    `2 radix log N / log radix`; additional memory `2 / radix` of the elements.

    **Raises:** `TypeError` or `ValueError` for a `radix` or `num_carries` that is not an integer or too small; `TypeError`
    for `carries` that is not a scan.
    """

    radix: int = eqx.field(static=True, default=8)
    num_carries: int = eqx.field(static=True, default=4096)
    carries: AbstractScan = KoggeStoneScan()

    def __check_init__(self):
        check_integer("BlockedScan", "radix", self.radix, "the number of elements in a block", least=2)
        check_integer("BlockedScan", "num_carries", self.num_carries, "the largest number of carries of the last level")
        check_instance("BlockedScan", "carries", self.carries, AbstractScan, "KoggeStoneScan()")

    def prefix(self, compose, elements, *, reverse=False):
        if reverse:
            return flipped(self.prefix(compose, flipped(elements)))
        num_steps = jtu.tree_leaves(elements)[0].shape[0]
        if num_steps <= self.num_carries:
            return self.carries.prefix(compose, elements)
        first, *rest = self._positions(elements)
        total = ft.reduce(compose, rest, first)
        before = self.prefix(compose, jtu.tree_map(lambda x: x[:-1], total))
        # The first block needs no composition: it starts the sequence.
        product = jtu.tree_map(
            lambda a, b: jnp.concatenate([a[:1], b]), first, compose(before, jtu.tree_map(lambda x: x[1:], first))
        )
        products = itertools.accumulate(rest, compose, initial=product)
        return jtu.tree_map(lambda *xs: join_segments(jnp.stack(xs, axis=1), num_steps), *products)

    def linear(self, transitions, r, *, reverse=False):
        if reverse:
            return flipped(self.linear(*flipped((transitions, r))))
        num_steps = r.shape[0]
        if num_steps <= self.num_carries:
            return self.carries.linear(transitions, r)
        # The first matrix multiplies zero and may hold anything.
        transitions = transitions.where(jnp.arange(num_steps) > 0)
        blocks = self._positions((transitions, r))
        product, d = blocks[0]
        for A, b in blocks[1:]:
            d = A.apply(d) + b
            product = A.after(product)
        d = shift(self.linear(product, d))
        ds = itertools.accumulate(blocks, lambda d, block: block[0].apply(d) + block[1], initial=d)
        return join_segments(jnp.stack(list(ds)[1:], axis=1), num_steps)

    def _positions(self, elements):
        """The first elements of all blocks, the second elements, and so on. Copies of the last element pad the last block;
        the results for them are dropped."""
        blocks = jtu.tree_map(lambda x: split_segments(x, length=self.radix, fill="last"), elements)
        return [jtu.tree_map(lambda x, k=k: x[:, k], blocks) for k in range(self.radix)]
