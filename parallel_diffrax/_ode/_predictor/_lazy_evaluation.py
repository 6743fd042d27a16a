"""Evaluation of a second guess only where the first is not good enough."""

from collections.abc import Callable
from typing import TypeVar

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool


_Tree = TypeVar("_Tree")


def evaluate_unless(done: Bool[Array, ""], value: _Tree, other: Callable[[], _Tree]) -> _Tree:
    """`value` if `done`, else `other()`. A batch evaluates `other` if one member needs it, and skips it if none does.

    (A loop of at most one iteration. `lax.cond` would evaluate `other` in every batch.)
    """

    def body(carry):
        return jnp.array(True), jtu.tree_map(lambda a, b: jnp.asarray(b, a.dtype), carry[1], other())

    return lax.while_loop(lambda carry: ~carry[0], body, (done, value))[1]
