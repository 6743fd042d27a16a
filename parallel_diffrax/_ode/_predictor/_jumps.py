"""Where the vector field jumps in time, and a fine grid whose steps end there."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._step_map import AbstractStepMap


# At most this many jumps of a window are located.
_MOST_JUMPS = 16
# Halvings of an interval. In double precision 53 reach neighbouring numbers, unless the interval begins at zero.
_MOST_HALVINGS = 64
# Before a jump, steps shorten by this ratio, this many times: to 2e-10 of the time since the window began.
_RATIO, _LEVELS = 5.0, 14


class Jumps(eqx.Module):
    """The jumps in or near a window, in arrays of fixed length, and which entries are `found`: the field jumps between the
    neighbouring times `before` and `after`."""

    before: Float[Array, " J"]
    after: Float[Array, " J"]
    found: Bool[Array, " J"]

    def nodes(self, t0: Float[Array, ""], t1: Float[Array, ""], graded: bool) -> Float[Array, " m"]:
        """Times at which the steps from `t0` to `t1` should end; `t1` where there are none.

        A step that ends just before a jump, and the next, which begins just after it, see a smooth field. If the solver's
        stages reach beyond the end of a step, steps must be `graded`: none is then longer than four times the time from its
        end to the jump.
        """
        ends = jnp.stack([self.before, self.after])
        if graded:
            ratios = jnp.asarray(_RATIO ** -np.arange(1.0, _LEVELS + 1), self.before.dtype)
            ends = jnp.concatenate([ends, self.before[None] - (self.before - t0)[None] * ratios[:, None]])
        return jnp.where(self.found[None], jnp.clip(ends, t0, t1), t1).reshape(-1)


def overshoots(step_map: AbstractStepMap) -> bool:
    """Whether a stage of the base solver lies after the end of its step."""
    tableau = getattr(step_map.solver, "tableau", None)
    parts = [getattr(tableau, name, None) for name in ("explicit", "implicit")]
    return any(np.max(getattr(part, "c", 0.0), initial=0.0) > 1 for part in (tableau, *parts))


def locate_jumps(
    slope: Callable[[Array, Float[Array, " D"]], Float[Array, " D"]], ts: Float[Array, " N1"], ys: Float[Array, " N1 D"]
) -> Jumps:
    """Finds jumps of the field `slope(t, y)` in time, at most one in each interval between the times `ts`, by bisection of
    all intervals at once with the state at their start.

    Each halving keeps the half over which the field changes more. The change of a smooth field falls by half; a jump
    remains. (Changes of the field with the state are not found. An adaptive controller shortens the window there.)
    """
    y = ys[:-1]
    field = lambda t: jax.vmap(slope)(t, y)
    begin, end = ts[:-1], ts[1:]
    first, last = field(begin), field(end)
    size = jnp.max(jnp.where(jnp.isfinite(first), jnp.abs(first), 0), axis=0, keepdims=True)
    size = jnp.maximum(size, jnp.max(jnp.where(jnp.isfinite(last), jnp.abs(last), 0), axis=0, keepdims=True))

    def change(a, b):
        relative = jnp.max(jnp.where(a == b, 0, jnp.abs(b - a) / size), axis=1)
        return jnp.where(jnp.isfinite(relative), relative, 0)

    initial, threshold = change(first, last), float(jnp.finfo(ys.dtype).eps) ** 0.5

    def jumping(begin, end, first, last, halvings):
        # A jump remains; eight times the smooth change is left after twice as many halvings.
        limit = jnp.maximum(threshold, initial * jnp.exp2(-0.5 * halvings.astype(initial.dtype) - 3))
        return change(first, last) > limit, _middle(begin, end)

    def keep_going(carry):
        active, middle = jumping(*carry)
        begin, end, *_, halvings = carry
        return jnp.any(active & (begin < middle) & (middle < end)) & (halvings < _MOST_HALVINGS)

    def halve(carry):
        begin, end, first, last, halvings = carry
        middle = _middle(begin, end)
        inner = field(middle)
        left = change(first, inner) >= change(inner, last)
        begin, end = jnp.where(left, begin, middle), jnp.where(left, middle, end)
        first, last = jnp.where(left[:, None], first, inner), jnp.where(left[:, None], inner, last)
        return begin, end, first, last, halvings + 1

    carry = lax.while_loop(keep_going, halve, (begin, end, first, last, jnp.array(0)))
    found, _ = jumping(*carry)
    index = jnp.nonzero(found, size=_MOST_JUMPS, fill_value=0)[0]
    valid = jnp.arange(_MOST_JUMPS) < jnp.sum(found)
    return Jumps(carry[0][index], carry[1][index], valid)


def _middle(begin, end):
    return begin + (end - begin) / 2


def divide(
    nodes: Float[Array, " m1"], density: Float[Array, " m1"], count: Int[Array, ""], num_steps: int
) -> tuple[Float[Array, " N1"], Bool[Array, ""]]:
    """A grid of `count` steps, in an array for `num_steps`, that ends steps at all increasing times `nodes`. Between two of
    them steps have equal lengths.

    Each interval that is not empty has one step, and the others are distributed in proportion to the increase of
    `density`. Also returns whether there are enough steps.
    """
    least = jnp.cumsum((nodes[1:] > nodes[:-1]).astype(count.dtype))
    spare = (count - least[-1]).astype(density.dtype)
    more = jnp.round(spare * (density[1:] - density[0]) / (density[-1] - density[0])).astype(count.dtype)
    first = jnp.concatenate([jnp.zeros(1, count.dtype), least + more])
    index = jnp.minimum(jnp.arange(num_steps + 1, dtype=count.dtype), count)
    k = jnp.clip(jnp.searchsorted(first, index, side="right") - 1, 0, nodes.shape[0] - 2)
    inside = jnp.clip((index - first[k]) / jnp.maximum(first[k + 1] - first[k], 1), 0, 1).astype(nodes.dtype)
    ts = jnp.where(inside < 1, nodes[k] + (nodes[k + 1] - nodes[k]) * inside, nodes[k + 1])
    return ts, least[-1] <= count
