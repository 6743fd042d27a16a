"""`Windows`, the step-size controller with which `dt0` is the fine step."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._solver import ParallelSolver
from ._window import nearly, UniformGrid


class _Uniform(eqx.Module):
    """Windows of `num_steps` steps of a grid. The last one ended after `index` steps."""

    grid: UniformGrid
    num_steps: int = eqx.field(static=True)
    index: Int[Array, ""]

    def next(self, t):
        del t
        state = eqx.tree_at(lambda state: state.index, self, self.index + self.num_steps)
        return self.grid.ends(state.index), state


class _Listed(eqx.Module):
    """Windows that end at given times."""

    ends: Float[Array, " W1"]

    def next(self, t):
        index = jnp.sum((self.ends <= t) | nearly(self.ends, t))
        return self.ends[jnp.minimum(index, self.ends.shape[0] - 1)], self


class Windows(dfx.AbstractStepSizeController):
    """Lays the windows of a `ParallelSolver`. `dt0` is the fine step, as it is for Diffrax's own solvers.

    Use it with `diffrax.diffeqsolve` and constant steps. (`parallel_diffrax.diffeqsolve` lays windows by itself.) The call
    changes in one line:

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

    - By default, the fine steps are those of `diffrax.ConstantStepSize` with this `dt0`. Each window has `num_steps` of
        them, 512 by default, the last one the remaining steps. `num_steps` is a capacity: it is the size of arrays, and an
        iteration in parallel takes the time of `num_steps` fine steps even if a window has fewer. For long solves in
        parallel give a large one, for short solves one that is not much larger than the number of steps.
    - With `ParallelSolver(..., num_steps, ts=ts)`, fine steps end at the given times, as those of `diffrax.StepTo(ts)` do.
        `dt0` must be `None`. Again each window has `num_steps` fine steps, the last one the remaining steps.

    Diffrax passes the solver's vector field, a method of the solver, to every controller. So the controller finds the
    solver, and tells it where fine steps end.

    **Cost:** none beside that of the windows. `max_steps` counts windows.

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
        if solver.ts is not None:
            return _listed(t0, t1, dt0, solver).next(t0)
        if dt0 is None:
            raise ValueError(
                "`diffeqsolve(..., dt0=None, stepsize_controller=Windows())`: `dt0` is the fine step; give one. (For fine "
                "steps of unequal lengths, give their ends, `ParallelSolver(..., ts=...)`.)"
            )
        grid = UniformGrid.make(t0, t1, dt0)
        solver.lay(grid)
        num_steps = solver.default_capacity(lists_steps=True) if solver.num_steps is None else solver.num_steps
        return _Uniform(grid, num_steps, jnp.array(0)).next(t0)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state):
        del t0, y0, y1_candidate, args, y_error, error_order
        end, controller_state = controller_state.next(t1)
        return True, t1, end, False, controller_state, dfx.RESULTS.successful


def _listed(t0, t1, dt0, solver: ParallelSolver) -> _Listed:
    call = "`diffeqsolve(..., solver=ParallelSolver(..., ts=ts), stepsize_controller=Windows())`"
    if dt0 is not None:
        raise ValueError(f"{call}: expected `dt0=None`, since `ts` says where every fine step ends; got `dt0={dt0!r}`.")
    ts = solver.fine_ts(jnp.result_type(t0))
    wrong = jnp.any(ts[1:] <= ts[:-1])
    ts = eqx.error_if(ts, wrong, f"{call}: `ts` must be strictly increasing, or strictly decreasing if `t0 > t1`.")
    ts = eqx.error_if(ts, (ts[0] != t0) | (ts[-1] != t1), f"{call}: expected `ts[0] == t0` and `ts[-1] == t1`.")
    return _Listed(jnp.append(ts[:-1][:: solver.capacity], ts[-1]))
