"""Whether a closure depends on traced values."""

from collections.abc import Sequence

import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import PyTree


def holds_tracers(values: Sequence, besides: PyTree) -> bool:
    """Whether any of these values is a tracer. The leaves of `besides` do not count."""
    own = {id(x) for x in jtu.tree_leaves(besides)}
    return any(isinstance(x, Tracer) and id(x) not in own for x in values)
