"""The result of many fine steps, extrapolated from a few large ones."""

import itertools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


# A large step is divided into this many parts, once each.
_PARTS = (1, 2, 3, 4)


def extrapolated(
    step: Callable[[Float[Array, " D"], tuple], Float[Array, " D"]],
) -> Callable[[Float[Array, " D"], tuple], Float[Array, " D"]]:
    """`step` made with several step sizes and extrapolated to the fine one.

    The result `T(h)` of stepping over an interval `H` with steps of size `h` is smooth in `h` (Gragg). It is computed for
    `h = H / n`, `n = 1 .. 4`. The polynomial through these values is evaluated at `h = H / s`, the step size of `s` fine
    steps. It is not evaluated at zero: the guess should reproduce the method on the fine grid, not the exact solution. For
    a method of any order the error is `O(H^5)` times `|(1/s - 1) (1/s - 1/2) (1/s - 1/3) (1/s - 1/4)|`. For a method of low
    order that is far better than one large step.

    **Arguments:** `step`, from a state and `(t0, t1)` to the next state.

    **Returns:** a function from a state and `(t0, t1, s)` to the state after `s` fine steps, approximately.

    **Cost:** ten steps, in four independent chains of at most four steps.
    """

    def extrapolated_step(y, x):
        t0, t1, num_fine = x
        results = []
        for parts in _PARTS:
            ts = [t0 + (t1 - t0) * (k / parts) for k in range(parts)] + [t1]
            state = y
            for begin, end in itertools.pairwise(ts):
                state = step(state, (begin, end))
            results.append(state)
        target = 1 / num_fine.astype(y.dtype)
        total, *rest = [w * state for w, state in zip(_lagrange_weights(target), results)]
        return sum(rest, total)

    return extrapolated_step


def _lagrange_weights(x: Float[Array, ""]) -> list[Float[Array, ""]]:
    """The weights of the values at `1, 1/2, 1/3, 1/4` in their interpolating polynomial at `x`."""
    nodes = [1 / n for n in _PARTS]
    weights = []
    for a in nodes:
        weight = jnp.ones_like(x)
        for b in nodes:
            if b != a:
                weight = weight * (x - b) / (a - b)
        weights.append(weight)
    return weights
