"""Newton's method on all steps of a recurrence at once."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._scan import AbstractScan, AssociativeScan
from ._jacobian import AbstractJacobian, Dense
from ._ravel import Ravel
from ._tolerance import first_failure, rounding_size, Tolerance


# An update that is larger than this many times the largest number in the guess has left the region in which the
# linearisation means anything: from there on the step is not taken.
_LARGEST_UPDATE = 1e2
# The iteration is given up after this many iterations in which neither the update halved nor the solved part grew.
_PATIENCE = 6


class _NewtonState(eqx.Module):
    largest: Float[Array, ""]
    # The size of the numbers that each entry was computed from: what its rounding errors are relative to.
    size: PyTree[Array]
    update: Float[Array, ""]
    best_update: Float[Array, ""]
    prefix: Int[Array, ""]
    best_prefix: Int[Array, ""]
    stalled: Int[Array, ""]
    terminate: Bool[Array, ""]
    diverged: Bool[Array, ""]


class ParallelNewton(optx.AbstractRootFinder):
    """Solves all steps of a recurrence together by Newton's method, each iteration one associative scan.

    For `r[i](y) = F[i](y[i-1]) - y[i]` with Jacobians `A[i]` of the steps, an iteration is

        d[i] = A[i] d[i-1] + r[i],   d[-1] = 0,       y <- y + d,

    which is solved in `O(log N)` depth. After `k` iterations the first `k` steps are exact whatever the guess, so it
    converges always, if slowly; from a good guess it takes a handful of iterations.

    It runs as the root finder of `parallel_diffrax.ParallelSolver` and `parallel_diffrax.parallel_scan`, and under
    `optimistix.root_find(fn, ParallelNewton(), y0)` for any `fn(y, args)` that returns such a residual: `y` and the
    residual are pytrees whose leading axis is the `N` steps.

    **Arguments:**

    - `rtol`, `atol`: the iteration has converged when every entry of the last update is at most `atol + rtol * scale`,
        `scale` being the largest magnitude that this component has had up to this time. One more Newton update is
        contained in the answer, so that its error is about the square of this. Below four times the machine epsilon
        `rtol` has no effect.
    - `norm`: a norm of one step's scaled update; the largest over all steps must be at most 1.
    - `jacobian`: what takes the place of `A`; the default, `Dense()`, is Newton's method.
    - `scan`: how the linear recurrence is evaluated.

    Where rounding keeps the update above the tolerance, as it can in float32 over long times, the iteration has converged
    once the update stops falling, while it is below half the digits and every step's own equation holds to rounding: no
    sequential solve could do better. An iterate is finite at all times: where an update is not finite or absurdly large,
    everything from that step on is left as it was, and a state out of which a step cannot be taken is replaced by the
    last good one.

    **Results:** `successful` under one of the two conditions above; `nonlinear_divergence` when neither the update falls
    nor the converged part grows; `nonlinear_max_steps_reached`. A NaN is never a success.

    **Statistics:** `converged_steps`, the number of leading steps that have converged; `update`, the largest scaled
    entry of the last update; `rounding_size`, what the rounding errors of each entry are relative to.

    Cost per iteration with `Dense()`: `D` Jacobian-vector products of a step and `D^3` multiplications a step; memory
    `N D^2`; depth `2 log2 N`.

    ??? cite "References"

        Lim et al., "Parallelizing non-linear sequential models over the sequence length", arXiv 2309.12252 (2023).

        Gonzalez, "Parallel Newton methods", arXiv 2603.16850 (2026).
    """

    rtol: float | Float[Array, ""] = 1e-8
    atol: float | Float[Array, ""] = 0.0
    norm: Callable[[PyTree], Float[Array, ""]] = optx.max_norm
    jacobian: AbstractJacobian = Dense()
    scan: AbstractScan = AssociativeScan()

    def __check_init__(self):
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            # Written so that NaN fails.
            if isinstance(value, (int, float)) and not value >= 0:
                raise ValueError(f"`ParallelNewton({name}={value!r})`: a tolerance must be a number of at least 0.")
            if isinstance(value, (int, float)) and name == "rtol" and 1 <= value < math.inf:
                raise ValueError(
                    f"`ParallelNewton(rtol={value!r})`: a relative tolerance of 1 or more accepts anything."
                )
        for name, kind in (("jacobian", AbstractJacobian), ("scan", AbstractScan)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"`ParallelNewton({name}={getattr(self, name)!r})`: expected an instance of `{kind.__name__}`, for "
                    "example `Dense()` or `AssociativeScan()`."
                )
        if not callable(self.norm):
            raise TypeError(
                f"`ParallelNewton(norm={self.norm!r})`: expected a function from an array to a number, for example "
                "`optimistix.max_norm`."
            )

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, args, options, aux_struct, tags
        _check_residual(y, f_struct)
        ys, ravel = _ravel_steps(y)
        infinite = jnp.array(jnp.inf, ravel.dtype)
        zero, false = jnp.array(0), jnp.array(False)
        largest = jnp.max(jnp.abs(ys))
        # A guess of zeros says nothing about the size of the solution.
        largest = _LARGEST_UPDATE * jnp.where(largest > 0, largest, jnp.inf)
        return _NewtonState(largest, y, infinite, infinite, zero, zero, zero, false, false)

    def step(self, fn, y, args, options, state, tags):
        del tags
        ys, ravel = _ravel_steps(y)
        tolerance = Tolerance(self.rtol, self.atol, self.norm, options.get("resolution", ravel.eps))

        def residual(ys):
            r, aux = fn(jax.vmap(ravel.unravel)(ys), args)
            return jax.vmap(ravel.ravel)(r), aux

        r, transitions, aux = self.jacobian.linearise(residual, ys)
        d = self.scan.solve(transitions, r)

        new_ys, taken = _update(ys, r, transitions.finite(), d, state.largest)
        scale = tolerance.scale(new_ys)
        size = rounding_size(transitions, scale)
        new_state = self._judge(state, tolerance, scale, size, r, d, taken)
        new_state = eqx.tree_at(lambda s: s.size, new_state, jax.vmap(ravel.unravel)(size))
        return jax.vmap(ravel.unravel)(new_ys), new_state, aux

    def _judge(self, state: _NewtonState, tolerance: Tolerance, scale, size, r, d, taken) -> _NewtonState:
        num_steps = d.shape[0]
        error = tolerance.error(d, scale)
        update = jnp.max(error)
        small = taken & (error <= 1)
        at_rounding = taken & tolerance.at_rounding(r, size) & tolerance.resolved(d, scale)
        prefix = first_failure(small | at_rounding)

        falling = update <= 0.25 * state.update
        converged = jnp.all(small) | (jnp.all(small | at_rounding) & ~falling)

        progress = (update <= 0.5 * state.best_update) | (prefix >= state.best_prefix + jnp.maximum(num_steps // 64, 1))
        stalled = jnp.where(progress, 0, state.stalled + 1)
        diverged = ~converged & (stalled >= _PATIENCE)
        return _NewtonState(
            largest=state.largest,
            size=state.size,
            update=update,
            best_update=jnp.where(progress, jnp.fmin(update, state.best_update), state.best_update),
            prefix=prefix,
            best_prefix=jnp.where(progress, jnp.maximum(prefix, state.best_prefix), state.best_prefix),
            stalled=stalled,
            terminate=converged | diverged,
            diverged=diverged,
        )

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        result = optx.RESULTS.where(state.diverged, optx.RESULTS.nonlinear_divergence, optx.RESULTS.successful)
        return state.terminate, result

    def postprocess(self, fn, y, aux, args, options, state, tags, result) -> tuple[PyTree, PyTree, dict[str, Any]]:
        return y, aux, {"converged_steps": state.prefix, "update": state.update, "rounding_size": state.size}


def _update(ys, r, finite_transitions, d, largest):
    """`ys + d` up to the first step where that makes no sense, and whether each step was taken."""
    stepped = ys + d
    sane = jnp.all(jnp.isfinite(stepped) & (jnp.abs(d) <= largest), axis=1)
    num_taken = first_failure(sane)
    taken = jnp.arange(ys.shape[0]) < num_taken
    # Beyond, a state stays as it was, unless the step out of it is not finite: then nothing can be learned from it.
    usable = finite_transitions & jnp.all(jnp.abs(r) <= largest, axis=1)
    usable = jnp.concatenate([usable[1:], jnp.array([True])])
    last = jnp.where(num_taken == 0, ys[0], stepped[jnp.maximum(num_taken, 1) - 1])
    kept = jnp.where(usable[:, None], ys, last)
    return jnp.where(taken[:, None], stepped, kept), taken


def _ravel_steps(y):
    ravel = Ravel(jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), y))
    return jax.vmap(ravel.ravel)(y), ravel


def _check_residual(y, f_struct):
    shapes = [x.shape for x in jtu.tree_leaves(y)]
    same = jtu.tree_structure(y) == jtu.tree_structure(f_struct)
    same = same and shapes == [x.shape for x in jtu.tree_leaves(f_struct)]
    if not same or len(shapes) == 0 or any(len(s) == 0 or s[0] != shapes[0][0] or s[0] == 0 for s in shapes):
        raise ValueError(
            "`ParallelNewton` solves residuals of recurrences: `fn(y, args)` must take a pytree of arrays whose leading "
            "axis is the number of steps, at least 1, and return `r[i] = F(y[i-1]) - y[i]` of the same structure and "
            f"shapes. Got `y` of shapes {shapes} and a residual {f_struct}. For a function of one step use "
            "`parallel_diffrax.parallel_scan`."
        )
