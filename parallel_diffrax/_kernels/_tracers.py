"""Whether a closure depends on what is being traced."""

from collections.abc import Sequence

import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import PyTree


def holds_tracers(values: Sequence, besides: PyTree) -> bool:
    """Whether any of these values is traced, other than the leaves of `besides`."""
    own = {id(x) for x in jtu.tree_leaves(besides)}
    return any(isinstance(x, Tracer) and id(x) not in own for x in values)
