"""Whether JAX can differentiate a function in forward mode."""

from collections.abc import Callable, Iterator

import jax
import jax.extend as jex
import jax.tree_util as jtu


# Primitives without a differentiation rule, or with one for reverse mode only.
_SUSPECT = frozenset(("custom_vjp_call", "custom_vjp_call_jaxpr", "pure_callback", "io_callback", "ffi_call"))
# JAX puts this primitive where the tangents of a `custom_vjp` are needed, and raises when it compiles it.
_MISSING = "custom_lin"


def has_forward_mode(fn: Callable, y, *args) -> bool:
    """Whether JAX can differentiate `fn(y, *args)` for `y` in forward mode. It cannot if a `jax.custom_vjp` or a callback
    depends on `y`. Traces `fn`, and once more if it contains such a part."""
    of_y = lambda y: fn(y, *args)
    if _SUSPECT.isdisjoint(_primitives(jax.make_jaxpr(of_y)(y).jaxpr)):
        return True
    try:
        products = jax.make_jaxpr(lambda y: jax.jvp(of_y, (y,), (y,))[1])(y)
    except (NotImplementedError, TypeError, ValueError):
        return False
    return _MISSING not in _primitives(products.jaxpr)


def _primitives(jaxpr) -> set[str]:
    """The names of all primitives of a program, and of the programs within."""
    return {eqn.primitive.name for eqn in _equations(jaxpr)}


def _equations(jaxpr) -> Iterator:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jtu.tree_leaves(list(eqn.params.values()), is_leaf=_is_program):
            if isinstance(inner, jex.core.ClosedJaxpr):
                yield from _equations(inner.jaxpr)
            elif isinstance(inner, jex.core.Jaxpr):
                yield from _equations(inner)


def _is_program(x) -> bool:
    return isinstance(x, jex.core.Jaxpr | jex.core.ClosedJaxpr)
