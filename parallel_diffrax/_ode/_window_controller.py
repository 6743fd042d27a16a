"""`Windows`, the step-size controller with which `dt0` is the fine step."""

import diffrax as dfx
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._solver import ParallelSolver


# Two times are equal if they differ by at most this many units of rounding.
_ROUNDINGS = 16


class _Uniform(eqx.Module):
    """`count` windows of equal length over `[t0, t1]`; endless windows of length `length` if `t1` is infinite."""

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    count: Float[Array, ""]
    length: Float[Array, ""]

    def end_after(self, t):
        rounding = _ROUNDINGS * jnp.finfo(t.dtype).eps * jnp.maximum(jnp.abs(t), jnp.abs(self.t0))
        index = jnp.floor((t - self.t0 + rounding) / self.length) + 1
        finite = jnp.isfinite(self.t1)
        span = jnp.where(finite, self.t1, self.t0) - self.t0
        # With the rounding of `diffrax.ConstantStepSize`.
        end = jnp.where(finite, self.t0 + span * (index / self.count), self.t0 + self.length * index)
        return jnp.where(index >= self.count, self.t1, end)


class _Listed(eqx.Module):
    """Windows that end at given times."""

    ends: Float[Array, " W1"]

    def end_after(self, t):
        rounding = _ROUNDINGS * jnp.finfo(t.dtype).eps * jnp.abs(t)
        index = jnp.searchsorted(self.ends, t + rounding, side="right")
        return self.ends[jnp.minimum(index, self.ends.shape[0] - 1)]


class Windows(dfx.AbstractStepSizeController):
    """Lays the windows of a `ParallelSolver`. `dt0` is the fine step, as it is for Diffrax's own solvers.

    Use it to make an existing call with a constant step size parallel. The call changes in one line:

    ```python
    sol = diffrax.diffeqsolve(
        term, t0=t0, t1=t1, dt0=dt0, y0=y0,
        solver=diffrax.Tsit5(),
    )

    sol = diffrax.diffeqsolve(
        term, t0=t0, t1=t1, dt0=dt0, y0=y0,
        solver=pdx.ParallelSolver(diffrax.Tsit5(), num_steps=4096), stepsize_controller=pdx.Windows(),
    )
    ```

    - By default, `[t0, t1]` is divided into `ceil(ceil((t1 - t0) / dt0) / num_steps)` windows of equal length. Fine steps
        are never longer than `dt0`. If `num_steps` divides the number of steps of `diffrax.ConstantStepSize`, they are
        the same steps; else they are shorter. Choose a `num_steps` that divides that number or is not much larger. With
        `t1=inf`, for solves that an event ends, windows of length `num_steps * dt0` follow one another.
    - With `ParallelSolver(..., num_steps, ts=ts)`, fine steps end at the given times, as those of `diffrax.StepTo(ts)` do.
        `dt0` must be `None`. Each window has `num_steps` fine steps, the last one the remaining steps.

    The number of fine steps in a window is an argument of the solver only. It is the size of arrays, so the solver cannot
    take it from the controller. The controller takes it from the solver: Diffrax passes the solver's vector field, a method
    of the solver, to every controller.

    **Raises:** `ValueError` for a solver without windows, for `dt0=None` without `ts`, and for a `dt0` with `ts`; a runtime
    error if `ts` are not strictly monotonic from `t0` to `t1`.
    """

    def wrap(self, direction):
        del direction
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        del terms, y0, args, error_order
        solver = getattr(func, "__self__", None)
        if not isinstance(solver, ParallelSolver):
            raise ValueError(
                f"`diffeqsolve(..., solver={solver!r}, stepsize_controller=Windows())`: only `ParallelSolver` has windows. "
                "Use `ParallelSolver(solver, num_steps)`, or without it `diffrax.ConstantStepSize()`."
            )
        windows = _uniform(t0, t1, dt0, solver.num_steps) if solver.ts is None else _listed(t0, t1, dt0, solver)
        return windows.end_after(t0), windows

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state):
        del t0, y0, y1_candidate, args, y_error, error_order
        return True, t1, controller_state.end_after(t1), False, controller_state, dfx.RESULTS.successful


def _uniform(t0, t1, dt0, num_steps: int) -> _Uniform:
    if dt0 is None:
        raise ValueError(
            "`diffeqsolve(..., dt0=None, stepsize_controller=Windows())`: `dt0` is the fine step; give one. (For fine steps "
            "of unequal lengths, give their ends, `ParallelSolver(..., ts=...)`.)"
        )
    # The number of steps that Diffrax makes, which tolerates rounding in `dt0`. It has no derivative, and JAX has no
    # differentiation rule for `nextafter`.
    span, step = lax.stop_gradient((t1 - t0, dt0))
    count = jnp.maximum(jnp.ceil(jnp.ceil(span / jnp.nextafter(step, jnp.full_like(step, jnp.inf))) / num_steps), 1)
    length = jnp.where(jnp.isfinite(t1), (t1 - t0) / count, num_steps * dt0)
    # Do not divide by the length of an empty span.
    return _Uniform(t0, t1, count, jnp.where(length == 0, 1, length))


def _listed(t0, t1, dt0, solver: ParallelSolver) -> _Listed:
    call = "`diffeqsolve(..., solver=ParallelSolver(..., ts=ts), stepsize_controller=Windows())`"
    if dt0 is not None:
        raise ValueError(f"{call}: expected `dt0=None`, since `ts` says where every fine step ends; got `dt0={dt0!r}`.")
    ts = solver.fine_ts(jnp.result_type(t0))
    wrong = jnp.any(ts[1:] <= ts[:-1])
    ts = eqx.error_if(ts, wrong, f"{call}: `ts` must be strictly increasing, or strictly decreasing if `t0 > t1`.")
    ts = eqx.error_if(ts, (ts[0] != t0) | (ts[-1] != t1), f"{call}: expected `ts[0] == t0` and `ts[-1] == t1`.")
    return _Listed(jnp.append(ts[:-1][:: solver.num_steps], ts[-1]))
