"""The steps of a recurrence in sequence, as fast as a device makes them."""

from collections.abc import Callable

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from ._scalar import as_objects, explode, scalarise


# A step of more scalar operations than this is left as it is, and unrolled steps together stay below it: beyond, the time
# to compile grows faster than the time saved.
_MAX_SCALAR_COST = 2000.0
_MAX_SCALAR_UNROLL = 8
_VECTOR_UNROLL = 4

# The steps in sequence between two looks at whether to go on. A loop of known length costs a GPU less than half per step
# of one whose condition it must read back.
CHUNK = 256

# A step in a loop that looks at each of them is worth more: it is one kernel or a hundred.
_MAX_LONE_COST = 8000.0

_Step = Callable[[Float[Array, " D"], PyTree], Float[Array, " D"]]


def step_through(
    step: _Step, state: Float[Array, " D"], xs: PyTree, length: int
) -> tuple[Float[Array, " D"], Float[Array, " n D"]]:
    """`state <- step(state, x)` for every `x` in `xs`: a `lax.scan`, in scalars where the step is small and the device
    launches kernels. (A CPU does not: there, vectors are up to ten times faster.)

    **Arguments:** the step, without tangents; the state to start from; inputs with a leading axis of `length`.

    **Returns:** the last state, and all of them.
    """
    first = jtu.tree_map(lambda x: x[0], xs)
    scalar = scalarise(step, state, first, max_cost=_MAX_SCALAR_COST)

    def accelerated(state, xs):
        if scalar is None:
            return step_through_vectors(step, state, xs, length, unroll=_VECTOR_UNROLL)
        return step_through_scalars(*scalar, state, xs, length)

    # Unrolling makes a loop on a CPU up to eight times slower, and everything slower to compile.
    return lax.platform_dependent(
        state, xs, cpu=lambda state, xs: step_through_vectors(step, state, xs, length), default=accelerated
    )


def step_through_vectors(step: _Step, state, xs, length: int, unroll: int = 1):
    """As `step_through`, with the step as it is."""

    def body(state, x):
        state = step(state, x)
        return state, state

    return lax.scan(body, state, xs, length=length, unroll=min(unroll, length))


def step_through_scalars(scalar_step: Callable, cost: float, state, xs, length: int):
    """As `step_through`, with a step and its cost from `scalarise`."""
    unroll = int(max(1, min(_MAX_SCALAR_UNROLL, _MAX_SCALAR_COST // max(cost, 1))))

    def body(state, x):
        state = tuple(scalar_step(as_objects(state), jtu.tree_map(explode, x)))
        return state, state

    state, states = lax.scan(body, tuple(state), xs, length=length, unroll=min(unroll, length))
    return jnp.stack(state), jnp.stack(states, axis=-1)


def accelerate(fn: Callable[..., Float[Array, " K"]], *examples: PyTree) -> Callable[..., Float[Array, " K"]]:
    """`fn`, of pytrees of small arrays and without tangents, in scalars where the device launches kernels.

    **Arguments:** the function, and examples of its arguments. It is returned as it is if it cannot be written so.
    """
    scalar = scalarise(fn, *examples, max_cost=_MAX_LONE_COST)
    if scalar is None:
        return fn

    def in_scalars(*args):
        return jnp.stack(list(scalar[0](*jtu.tree_map(explode, args))))

    return lambda *args: lax.platform_dependent(*args, cpu=fn, default=in_scalars)
