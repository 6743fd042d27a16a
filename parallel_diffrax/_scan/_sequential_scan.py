"""A scan one step after the other."""

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._abstract_scan import AbstractScan


class SequentialScan(AbstractScan):
    """`jax.lax.scan`: `N` steps of depth 1. Least work, fastest on a CPU for short sequences; the oracle of the others.

    Work `N` compositions; a linear recurrence takes `N D^2` (dense) or `N D` (diagonal), since only the vector is carried.
    """

    def prefix(self, compose, elements, *, reverse=False):
        def body(product, element):
            product = compose(product, element)
            return product, product

        first, others = _begin(elements, reverse)
        _, rest = lax.scan(body, first, others, reverse=reverse)
        return _join(first, rest, reverse)

    def linear(self, transitions, r, *, reverse=False):
        def body(d, element):
            A, r = element
            d = A.apply(d) + r
            return d, d

        # The first coefficients multiply zero, and may be anything.
        (_, first), others = _begin((transitions, r), reverse)
        _, rest = lax.scan(body, first, others, reverse=reverse)
        return _join(first, rest, reverse)


def _begin(elements, reverse: bool):
    """The element that a scan starts from, and the others."""
    first = jtu.tree_map(lambda x: x[-1 if reverse else 0], elements)
    return first, jtu.tree_map(lambda x: x[:-1] if reverse else x[1:], elements)


def _join(first, rest, reverse: bool):
    def join(first, rest):
        return jnp.concatenate([rest, first[None]] if reverse else [first[None], rest])

    return jtu.tree_map(join, first, rest)
