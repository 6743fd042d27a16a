"""Whether a closure depends on traced values, and a form of it in which these are its leaves."""

from collections.abc import Callable, Sequence

import jax
import jax.tree_util as jtu
from jax.core import eval_jaxpr, Tracer
from jaxtyping import PyTree


def closed(fn: Callable, *examples: PyTree) -> Callable:
    """`fn` as a pytree, whose leaves are the arrays that it closes over. `examples` are examples of its arguments. (That of
    Equinox refuses arguments that are distributed in another way than the examples, as they are under `jax.shard_map`.)"""
    program, structure = jax.make_jaxpr(fn, return_shape=True)(*examples)

    def run(consts, *args):
        outs = eval_jaxpr(program.jaxpr, consts, *jtu.tree_leaves(args))
        return jtu.tree_unflatten(jtu.tree_structure(structure), outs)

    return jtu.Partial(run, program.consts)


def holds_tracers(values: Sequence, besides: PyTree) -> bool:
    """Whether any of these values is a tracer. The leaves of `besides` do not count."""
    own = {id(x) for x in jtu.tree_leaves(besides)}
    return any(isinstance(x, Tracer) and id(x) not in own for x in values)
