"""The solution on a coarse grid, in sequence, and its interpolation to the fine grid."""

from collections.abc import Callable

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._recurrence import Recurrence, Stepper, without_tangents
from ..._scan import row_at
from .._step_map import AbstractEmbeddedSolver
from .._window import Window
from ._extrapolation import extrapolated


# One large step of an explicit method of at most this order predicts many fine steps poorly.
_LOW_ORDER = 2


def num_coarse_steps(num_steps: int, stride: int) -> int:
    """The number of coarse steps of `stride` fine steps each; the last may be shorter."""
    return -(-num_steps // stride)


def coarse_step(recurrence: Recurrence, window: Window) -> Callable[[Float[Array, " D"], tuple], Float[Array, " D"]]:
    """A function from a state and `(t0, t1, s)` to the state after `s` fine steps, approximately: one step of the base
    solver, an extrapolated step, or a step of the embedded solver."""
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


def solve_coarse(
    recurrence: Recurrence, window: Window, stride: Int[Array, ""], capacity: int
) -> tuple[Float[Array, " M1 D"], Int[Array, ""]]:
    """Steps through every `stride`-th fine time in sequence, in at most `capacity` coarse steps.

    A state that is not finite ends the solve: no chunk of steps begins after it, and a kernel stops at it.

    **Returns:** the states at the coarse times, NaN where they were not computed; the number of steps made.
    """
    ts, num_steps = window.ts, window.num_steps
    example = ts[0], ts[0], jnp.asarray(stride)
    stepper = Stepper(coarse_step(recurrence, window), recurrence.init, example, capacity, while_finite=True)
    chunk = stepper.chunk
    size = -(-capacity // chunk) * chunk
    # Past the end of the grid, steps have length zero, and nothing reads their states.
    index = jnp.minimum(jnp.arange(size + 1) * stride, num_steps)
    times, num_fine = ts[index], jnp.maximum(jnp.diff(index), 1)
    nodes = jnp.full((size + 1, *recurrence.init.shape), jnp.nan, recurrence.init.dtype).at[0].set(recurrence.init)
    # Rounded up.
    wanted = -(-jnp.asarray(window.count) // stride)

    def keep_going(carry):
        begin, y, _ = carry
        return (begin < wanted) & jnp.all(jnp.isfinite(y))

    def body(carry):
        begin, y, nodes = carry
        t = lax.dynamic_slice_in_dim(times, begin, chunk + 1)
        inputs = t[:-1], t[1:], lax.dynamic_slice_in_dim(num_fine, begin, chunk)
        states, made, _ = stepper(y, inputs, wanted - begin)
        return begin + made, states[-1], lax.dynamic_update_slice_in_dim(nodes, states, begin + 1, axis=0)

    carry = jnp.array(0), recurrence.init, nodes
    # A single chunk needs no loop. The host would read back the loop's condition twice.
    made, _, nodes = body(carry) if chunk == capacity else lax.while_loop(keep_going, body, carry)
    return nodes, made


def interpolate(
    recurrence: Recurrence,
    window: Window,
    nodes: Float[Array, " M1 D"],
    stride: Int[Array, ""],
    wanted: Int[Array, " n"] | None = None,
) -> Float[Array, " n D"]:
    """The states after all fine steps, or after the `wanted` ones, from the states at the coarse times: by cubics, or by
    straight lines where the solution is not smooth.

    (The base solver's dense output has a higher order for some methods and is linear for others, and it costs one more
    step at every coarse time.)
    """
    ts, last = window.ts, window.num_steps - 1
    begin = jnp.minimum(jnp.arange(nodes.shape[0]) * stride, window.num_steps)
    fine = jnp.arange(window.num_steps) if wanted is None else wanted
    # The inputs hold the same times, and may be spread over devices.
    ends = recurrence.inputs[1] if wanted is None else ts[wanted + 1]
    k = fine // stride
    t0, t1 = ts[begin[k]], ts[begin[k + 1]]
    y0, y1 = nodes[k], nodes[k + 1]
    x = ((ends - t0) / (t1 - t0)).astype(nodes.dtype)[:, None]
    if window.step_map.smooth:
        slopes = _slopes(recurrence, window, jnp.minimum(begin, last), nodes)
        guess = hermite(x, (t1 - t0).astype(nodes.dtype)[:, None], y0, y1, slopes[k], slopes[k + 1])
    else:
        guess = y0 + x * (y1 - y0)
    # Steps of length zero, at the end of a window, cannot be interpolated over.
    return jnp.where((fine < window.count)[:, None], guess, row_at(guess, jnp.maximum(window.count - 1, 0))[None])


def hermite(
    x: Float[Array, "*N #D"],
    length: Float[Array, "*N #D"],
    y0: Float[Array, "*N D"],
    y1: Float[Array, "*N D"],
    slope0: Float[Array, "*N D"],
    slope1: Float[Array, "*N D"],
) -> Float[Array, "*N D"]:
    """The cubic with the values `y0`, `y1` and the slopes `slope0`, `slope1` at the ends of an interval of this `length`,
    evaluated at the fraction `x` of the interval."""
    start, end = slope0 * length - (y1 - y0), slope1 * length - (y1 - y0)
    return y0 + x * (y1 - y0) + x * (1 - x) * ((1 - x) * start - x * end)


def slope_of(
    embedded_solver: AbstractEmbeddedSolver, window: Window
) -> Callable[[Array, Float[Array, " D"]], Float[Array, " D"]]:
    """The derivative of the solution as a function of a time and a raveled state, without tangents."""
    ravel = window.ravel
    slope = lambda t, y: ravel.ravel(embedded_solver.slope(t, ravel.unravel(y)))
    return without_tangents(slope, window.ts[0], ravel.ravel(window.y0))


def _slopes(recurrence, window, steps: Int[Array, " M1"], nodes: Float[Array, " M1 D"]) -> Float[Array, " M1 D"]:
    """The derivatives of the solution at the states `nodes` before the fine steps `steps`.

    An implicit step gives the slope of a stiff system as a difference quotient: off the slow solution, the field does not
    give it.
    """
    step_map, ts = window.step_map, window.ts
    if step_map.explicit and step_map.embedded_solver is not None:
        return jax.vmap(slope_of(step_map.embedded_solver, window))(ts[steps], nodes)
    # The step size has the sign of the direction of time.
    step_size = (ts[steps + 1] - ts[steps]).astype(nodes.dtype)
    return (jax.vmap(recurrence.step)(nodes, (ts[steps], ts[steps + 1])) - nodes) / step_size[:, None]
