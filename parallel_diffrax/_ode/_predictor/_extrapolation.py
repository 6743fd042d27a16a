"""The result of many fine steps, extrapolated from a few large ones."""

import functools as ft
import itertools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


# A large step is divided into this many parts, once each.
_PARTS = (1, 2, 3, 4)


def extrapolated(
    step: Callable[[Float[Array, " D"], tuple], Float[Array, " D"]],
) -> Callable[[Float[Array, " D"], tuple], Float[Array, " D"]]:
    """A function from a state and `(t0, t1, s)` to the state after `s` fine steps, approximately: `step`, a function of a
    state and `(t0, t1)`, made with four step sizes and extrapolated to the fine one.

    The result `T(h)` of stepping over an interval `H` with steps of size `h` is smooth in `h` (Gragg). It is computed for
    `h = H / n`, `n = 1 .. 4`: ten steps, in four independent chains. The polynomial through these values is evaluated at
    `h = H / s`, not at zero: the guess should reproduce the method on the fine grid, not the exact solution. For a method
    of any order the error is `O(H^5)` times `|(1/s - 1) (1/s - 1/2) (1/s - 1/3) (1/s - 1/4)|`. For a method of low order
    that is far better than one large step.
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
        total, *rest = [_lagrange_weight(target, parts) * state for parts, state in zip(_PARTS, results)]
        return sum(rest, total)

    return extrapolated_step


def _lagrange_weight(x: Float[Array, ""], n: int) -> Float[Array, ""]:
    """The weight of the value at `1 / n` in the polynomial at `x` through the values at `1, 1/2, 1/3, 1/4`."""
    others = (1 / m for m in _PARTS if m != n)
    return ft.reduce(lambda weight, b: weight * (x - b) / (1 / n - b), others, jnp.ones_like(x))
