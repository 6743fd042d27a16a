"""The same method on a coarser grid."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._recurrence import CHUNK, Recurrence, step_through
from .._interpolation import interpolate_at
from .._window import Window
from ._base import AbstractPredictor, Prediction


# A guess is good enough if the defects it leaves add up to at most this, relative to the size of the solution: measured
# on seven oscillating, chaotic and smooth problems, Newton then takes 2 to 5 iterations, and up to 24 from a worse one.
_GOOD = 3e-3
# Beyond this it is worse than no guess.
_USELESS = 0.5


class CoarsePredictor(AbstractPredictor):
    """Steps the base solver through a subset of the fine grid, in sequence, and interpolates with its dense output.

    The number of coarse steps is found by trying: the guess is put into the fine steps' equations, and if the defects
    that it leaves add up to more than 0.3 % of the solution's size (or it is not finite), the coarse grid is halved, as
    long as all coarse steps together stay within `max_share` of the fine ones. If even the last guess is of no use, the
    initial state is the guess, from which an unstable coarse grid over a linear or strongly damped problem converges.

    **Arguments:**

    - `num_steps`: the number of coarse steps of the first try, at most `max_share` of the fine ones. The default is one
        in 16 fine steps, and at most 1024.
    - `max_share`: the largest share of `N` sequential steps that may be spent, between 0 and 1.

    Cost: the coarse steps in sequence; per try, two evaluations of the fine steps' size in parallel.
    """

    num_steps: int | None = eqx.field(static=True, default=None)
    max_share: float = eqx.field(static=True, default=0.25)

    def __check_init__(self):
        count = self.num_steps
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(
                f"`CoarsePredictor(num_steps={self.num_steps!r})`: the number of coarse steps must be an integer of at "
                "least 1, or `None` for the default."
            )
        if not isinstance(self.max_share, (int, float)) or not 0 < self.max_share <= 1:
            raise ValueError(
                f"`CoarsePredictor(max_share={self.max_share!r})`: the share of sequential steps must be in (0, 1]."
            )

    def predict(self, window, recurrence):
        strides = self._strides(window.num_steps)
        if len(strides) == 0:
            y = jnp.broadcast_to(recurrence.init, (recurrence.length, *recurrence.init.shape))
            return Prediction(y, jnp.array(0))
        capacity = _num_coarse(window.num_steps, strides[-1])

        def keep_trying(carry):
            attempt, _, score, _ = carry
            return (attempt < len(strides)) & ~(score <= _GOOD)

        def attempt(carry):
            attempt, _, _, steps = carry
            stride = jnp.asarray(strides)[attempt]
            nodes, made = _solve_coarse(recurrence, window, stride, capacity)
            guess = _interpolate(window, nodes, stride)
            return attempt + 1, guess, _score(recurrence, guess), steps + made

        guess = jnp.zeros((recurrence.length, *recurrence.init.shape), recurrence.init.dtype)
        initial = (jnp.array(0), guess, jnp.array(jnp.inf, guess.dtype), jnp.array(0))
        _, guess, score, steps = lax.while_loop(keep_trying, attempt, initial)
        return Prediction(jnp.where(score <= _USELESS, guess, recurrence.init), steps)

    def _strides(self, num_steps: int) -> list[int]:
        """How many fine steps make a coarse one, for each try: halved as long as the share allows."""
        first = min(num_steps // 16, 1024) if self.num_steps is None else self.num_steps
        if first == 0:
            return []
        stride, strides, spent = -(-num_steps // first), [], 0
        while stride >= 1:
            spent += _num_coarse(num_steps, stride)
            if spent > self.max_share * num_steps:
                break
            strides.append(stride)
            stride //= 2
        return strides


def _num_coarse(num_steps: int, stride: int) -> int:
    return -(-num_steps // stride)


def _solve_coarse(
    recurrence: Recurrence, window: Window, stride: Int[Array, ""], capacity: int
) -> tuple[Float[Array, " M1 D"], Int[Array, ""]]:
    """The states at every `stride`-th fine time, and the number of steps made. A state that is not finite ends it: the
    rest is NaN."""
    ts, num_steps = window.ts, window.num_steps
    chunk = min(CHUNK, capacity)
    size = -(-capacity // chunk) * chunk
    # Past the end of the grid, steps have length zero and are never looked at.
    times = ts[jnp.minimum(jnp.arange(size + 1) * stride, num_steps)]
    nodes = jnp.full((size + 1, *recurrence.init.shape), jnp.nan, recurrence.init.dtype).at[0].set(recurrence.init)

    def keep_going(carry):
        begin, y, _ = carry
        return (begin * stride < window.count) & jnp.all(jnp.isfinite(y))

    def body(carry):
        begin, y, nodes = carry
        t = lax.dynamic_slice_in_dim(times, begin, chunk + 1)
        y, states = step_through(recurrence.step, y, (t[:-1], t[1:]), chunk)
        return begin + chunk, y, lax.dynamic_update_slice_in_dim(nodes, states, begin + 1, axis=0)

    made, _, nodes = lax.while_loop(keep_going, body, (jnp.array(0), recurrence.init, nodes))
    return nodes, made


def _interpolate(window: Window, nodes: Float[Array, " M1 D"], stride: Int[Array, ""]) -> Float[Array, " N D"]:
    """The base solver's dense output of the coarse steps, at the fine times."""
    num_steps, ravel = window.num_steps, window.ravel
    coarse_ts = window.ts[jnp.minimum(jnp.arange(nodes.shape[0]) * stride, num_steps)]
    infos = jax.vmap(lambda t0, t1, y: window.step_map(t0, t1, ravel.unravel(y)).dense_info)(
        coarse_ts[:-1], coarse_ts[1:], nodes[:-1]
    )
    fine = jnp.arange(num_steps)
    states = interpolate_at(window.interpolation_cls, coarse_ts, infos, fine // stride, window.ts[1:])
    guess = jax.vmap(ravel.ravel)(states)
    # There is no interpolation over steps of length zero.
    return jnp.where((fine < window.count)[:, None], guess, guess[jnp.maximum(window.count - 1, 0)])


def _score(recurrence: Recurrence, guess: Float[Array, " N D"]) -> Float[Array, ""]:
    """How far off a guess is: the largest partial sum of the defects that it leaves, relative to each component's size.
    That is its Picard correction; Newton's differs by how the dynamics amplify it."""
    defect = recurrence.residual(guess)
    size = jnp.maximum(jnp.max(jnp.abs(guess), axis=0), jnp.abs(recurrence.init))
    drift = jnp.max(jnp.abs(jnp.cumsum(defect, axis=0)), axis=0)
    score = jnp.max(jnp.where(drift == 0, 0, drift / size), initial=0.0)
    return jnp.where(jnp.all(jnp.isfinite(defect)), score, jnp.inf)
