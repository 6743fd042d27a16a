"""The same method on a coarser grid."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._recurrence import (
    num_leading_true,
    Prediction,
    Recurrence,
    repeat_segments,
    running_sum,
    segment_maxima,
    Stepper,
)
from ..._scan import check_integer, row_at, shift
from .._window import Window
from ._base import AbstractPredictor, hermite, slope_of, without_tangents
from ._extrapolation import extrapolated


# A guess is good enough if the defects it leaves add up to at most this, relative to the size of the solution: measured
# on seven oscillating, chaotic and smooth problems, Newton then takes 2 to 5 iterations, and up to 24 from a worse one.
GOOD = 3e-3
# So much better, and one from steps twice as large may do.
_BETTER = 1 / 16
# Beyond this it is worse than no guess.
_USELESS = 0.5
# Of use is judged by what happened in the last one of so many parts.
_MEMORY = 16
# One large step of a method of at most this order says little about many fine ones.
_LOW_ORDER = 2
# The size of a guess so far is known up to so many places.
_PARTS = 512


class CoarsePredictor(AbstractPredictor):
    """Steps the base solver through a subset of the fine grid, in sequence, and interpolates between.

    An explicit solver of order 1 or 2 makes each coarse step with four step sizes, extrapolated to the fine one.

    The number of coarse steps is found by trying: the guess is put into the fine steps' equations, and if the defects
    that it leaves add up to more than 0.3 % of the solution's size (or it is not finite), the coarse steps are halved, as
    long as all together are at most `max_share` times as many as fine ones and this makes the guess twice as good. Where
    even the last guess is of no use any more, it stays as it is: linear and strongly damped problems converge from that.

    **Arguments:**

    - `num_steps`: the number of coarse steps of the first try, at most `max_share` of the fine ones. The default is one
        in 16 fine steps, and at most 1024.
    - `max_share`: the largest share of `N` sequential steps that may be spent, between 0 and 1.

    Cost: the coarse steps in sequence; per try, two evaluations of the fine steps' size in parallel.
    """

    num_steps: int | None = eqx.field(static=True, default=None)
    max_share: float = eqx.field(static=True, default=0.25)

    def __check_init__(self):
        check_integer("CoarsePredictor", "num_steps", self.num_steps, "the number of coarse steps", optional=True)
        if not isinstance(self.max_share, (int, float)) or not 0 < self.max_share <= 1:
            raise ValueError(
                f"`CoarsePredictor(max_share={self.max_share!r})`: the share of sequential steps must be in (0, 1]."
            )

    def predict(self, window, recurrence, start_level):
        substeps = window.step_map.num_substeps
        strides = self._strides(window.num_steps, substeps)
        if len(strides) == 0:
            y = jnp.broadcast_to(recurrence.init, (recurrence.length, *recurrence.init.shape))
            return Prediction(y, jnp.array(0), jnp.array(recurrence.length), jnp.asarray(start_level))
        capacity = _num_coarse(window.num_steps, strides[-1])

        first = jnp.clip(jnp.asarray(start_level), 0, len(strides) - 1)

        def keep_trying(carry):
            attempt, _, _, score, before, steps = carry
            improves = ~(score > 0.5 * before) | ~jnp.isfinite(score)
            more = (attempt < len(strides)) & ~(score <= GOOD) & improves
            cost = window.count / jnp.asarray(strides)[jnp.minimum(attempt, len(strides) - 1)]
            return (attempt == first) | (more & (steps + cost <= self.max_share * substeps * window.count))

        def attempt(carry):
            attempt, _, _, score, before, steps = carry
            stride = jnp.asarray(strides)[attempt]
            nodes, made = solve_coarse(recurrence, window, stride, capacity)
            guess = interpolate(recurrence, window, nodes, stride)
            before = jnp.where(jnp.isfinite(score), score, before)
            return attempt + 1, guess, *assess(recurrence, guess), before, steps + made

        guess = jnp.zeros((recurrence.length, *recurrence.init.shape), recurrence.init.dtype)
        infinite = jnp.array(jnp.inf, guess.dtype)
        tried, guess, useful, score, _, steps = lax.while_loop(
            keep_trying, attempt, (first, guess, jnp.array(0), infinite, infinite, jnp.array(0))
        )
        # The next part begins with the steps that were good enough, or with larger or smaller ones.
        start_level = jnp.where(score <= GOOD, jnp.where(score <= _BETTER * GOOD, tried - 2, tried - 1), tried)
        last = jnp.where(useful > 0, row_at(guess, jnp.maximum(useful - 1, 0)), recurrence.init)
        guess = jnp.where((jnp.arange(recurrence.length) < useful)[:, None], guess, last)
        return Prediction(guess, steps, jnp.where(useful > 0, useful, recurrence.length), start_level)

    def _strides(self, num_steps: int, substeps: int) -> list[int]:
        """How many steps make a coarse one, for each try: halved as long as the share allows. A step may be several of the
        base solver's."""
        sequential = num_steps * substeps
        first = min(sequential // 16, 1024, num_steps) if self.num_steps is None else min(self.num_steps, num_steps)
        if first == 0:
            return []
        stride, strides = -(-num_steps // first), []
        while stride >= 1 and _num_coarse(num_steps, stride) <= self.max_share * sequential:
            strides.append(stride)
            stride //= 2
        return strides


def _num_coarse(num_steps: int, stride: int) -> int:
    return -(-num_steps // stride)


def solve_coarse(
    recurrence: Recurrence, window: Window, stride: Int[Array, ""], capacity: int
) -> tuple[Float[Array, " M1 D"], Int[Array, ""]]:
    """The states at every `stride`-th fine time, and the number of steps made. After a state that is not finite no other
    chunk of steps is begun, nor is one in a kernel continued: the states there are not finite."""
    ts, num_steps = window.ts, window.num_steps
    example = ts[0], ts[0], jnp.asarray(stride)
    stepper = Stepper(coarse_step(recurrence, window), recurrence.init, example, capacity, while_finite=True)
    chunk = stepper.chunk
    size = -(-capacity // chunk) * chunk
    # Past the end of the grid, steps have length zero and are never looked at.
    index = jnp.minimum(jnp.arange(size + 1) * stride, num_steps)
    times, num_fine = ts[index], jnp.maximum(jnp.diff(index), 1)
    nodes = jnp.full((size + 1, *recurrence.init.shape), jnp.nan, recurrence.init.dtype).at[0].set(recurrence.init)
    # (The division rounds up.)
    wanted = -(-jnp.asarray(window.count) // stride)

    def keep_going(carry):
        begin, y, _ = carry
        return (begin < wanted) & jnp.all(jnp.isfinite(y))

    def body(carry):
        begin, y, nodes = carry
        t = lax.dynamic_slice_in_dim(times, begin, chunk + 1)
        inputs = t[:-1], t[1:], lax.dynamic_slice_in_dim(num_fine, begin, chunk)
        states, made = stepper(y, inputs, wanted - begin)
        return begin + made, states[-1], lax.dynamic_update_slice_in_dim(nodes, states, begin + 1, axis=0)

    carry = jnp.array(0), recurrence.init, nodes
    # No loop of one turn: it costs the host two looks.
    made, _, nodes = body(carry) if chunk == capacity else lax.while_loop(keep_going, body, carry)
    return nodes, made


def coarse_step(recurrence: Recurrence, window: Window) -> Callable[[Float[Array, " D"], tuple], Float[Array, " D"]]:
    """From a state and `(t0, t1, s)` to what `s` fine steps make of it: the base solver's step, or one that is about as good
    for a guess."""
    step_map, ravel, single = window.step_map, window.ravel, window.step_map.single
    y, times = recurrence.init, (window.ts[0], window.ts[1])
    step = recurrence.step
    if single is not step_map:
        step = without_tangents(lambda y, x: y + ravel.ravel(single.increment(x[0], x[1], ravel.unravel(y))), y, times)
    if step_map.smooth and step_map.explicit and step_map.order <= _LOW_ORDER:
        large = extrapolated(step)
        return lambda y, x: large(y, (*x[:2], step_map.num_substeps * x[2]))
    embedded_solver = step_map.embedded_solver
    if recurrence.stages is None or embedded_solver is None:
        return lambda y, x: step(y, x[:2])
    trial = without_tangents(
        lambda y, x: ravel.ravel(embedded_solver.trial(x[0], x[1], ravel.unravel(y), None)[0]), y, times
    )
    return lambda y, x: trial(y, x[:2])


def interpolate(
    recurrence: Recurrence,
    window: Window,
    nodes: Float[Array, " M1 D"],
    stride: Int[Array, ""],
    wanted: Int[Array, " n"] | None = None,
) -> Float[Array, " n D"]:
    """The states after all fine steps, or after the `wanted` ones: cubic between the coarse ones, straight where the
    solution is not smooth.

    (The base solver's dense output is of higher order for some and straight for others, and it costs another step at
    every coarse time.)
    """
    ts, last = window.ts, window.num_steps - 1
    begin = jnp.minimum(jnp.arange(nodes.shape[0]) * stride, window.num_steps)
    # (Times are read from the inputs, which may be spread over devices.)
    fine = jnp.arange(window.num_steps) if wanted is None else wanted
    ends = recurrence.inputs[1] if wanted is None else ts[wanted + 1]
    k = fine // stride
    t0, t1 = ts[begin[k]], ts[begin[k + 1]]
    y0, y1 = nodes[k], nodes[k + 1]
    length = (t1 - t0).astype(nodes.dtype)
    x = ((ends - t0) / (t1 - t0)).astype(nodes.dtype)[:, None]
    if window.step_map.smooth:
        slopes = _slopes(recurrence, window, jnp.minimum(begin, last), nodes)
        guess = hermite(x, length[:, None], y0, y1, slopes[k], slopes[k + 1])
    else:
        guess = y0 + x * (y1 - y0)
    # There is no interpolation over steps of length zero.
    return jnp.where((fine < window.count)[:, None], guess, row_at(guess, jnp.maximum(window.count - 1, 0)))


def _slopes(
    recurrence: Recurrence, window: Window, steps: Int[Array, " M1"], nodes: Float[Array, " M1 D"]
) -> Float[Array, " M1 D"]:
    """The derivatives of the solution at states before these steps. Off the slow solution of a stiff system the field says
    nothing, and an implicit step does."""
    step_map, ts = window.step_map, window.ts
    if step_map.explicit and step_map.embedded_solver is not None:
        return jax.vmap(slope_of(step_map.embedded_solver, window))(ts[steps], nodes)
    # The step size has the sign of the direction of time.
    step_size = (ts[steps + 1] - ts[steps]).astype(nodes.dtype)
    return (jax.vmap(recurrence.step)(nodes, (ts[steps], ts[steps + 1])) - nodes) / step_size[:, None]


def assess(recurrence: Recurrence, guess: Float[Array, " N D"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """How far a guess is of use, and how far off it is.

    Measured by the partial sums of the defects that it leaves, relative to each component's size so far: its Picard
    correction, from which Newton's differs by how the dynamics amplify it. (The size of the whole would excuse a guess
    that grows without bound.)

    **Returns:** the number of leading steps up to which it is small, summed over the last sixteenth of all steps only:
    that of a guess that follows the solution with a phase error grows with time, and it is a good one all the same; the
    largest entry of the whole.
    """
    defect = recurrence.residual(guess)
    finite = jnp.all(jnp.isfinite(guess) & jnp.isfinite(defect), axis=1)
    size = jnp.maximum(_size_so_far(jnp.abs(jnp.where(finite[:, None], guess, 0))), jnp.abs(recurrence.init))
    drift = running_sum(defect)
    recent = drift - shift(drift, -(-recurrence.length // _MEMORY))
    score = jnp.where(jnp.all(finite), jnp.max(_relative(drift, size)), jnp.inf)
    return num_leading_true(finite & (_relative(recent, size) <= _USELESS)), score


def _relative(drift, size):
    return jnp.max(jnp.where(drift == 0, 0, jnp.abs(drift) / size), axis=1)


def _size_so_far(magnitude: Float[Array, " N D"]) -> Float[Array, " N D"]:
    """The largest entry of each column so far, or a little later: up to the end of the 512th part of all rows, so that a
    component may start from zero."""
    return repeat_segments(lax.cummax(segment_maxima(magnitude, _PARTS), axis=0), magnitude.shape[0], _PARTS)
