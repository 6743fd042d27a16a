"""What a `ParallelSolver` carries from window to window, and how a user reads its statistics."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from ._statistics import WindowStatistics


class SolverState(eqx.Module):
    """The solver state of `ParallelSolver`.

    It can be passed to a later solve, `diffeqsolve(..., solver_state=sol.solver_state)`. A `WarmStart` predictor then begins
    with the stored trajectory. A solve that begins at `end` continues the statistics. Any other solve counts from zero.

    **Attributes:**

    - `statistics`: what the solve did so far.
    - `end`: the end of the last window, in Diffrax's internal time, which increases.
    - `trajectory`: the states of the fine steps of the first `K` windows, raveled, shape `(K, N, D)`, without derivatives;
        NaN for a window that was not made or failed. `None` unless the predictor asks for it.
    - `base_state`: the base solver's own state at `end`, if its steps depend on one; else `None`.
    """

    statistics: WindowStatistics
    end: Float[Array, ""]
    trajectory: Float[Array, " K N D"] | None = None
    base_state: PyTree = None

    @classmethod
    def start(cls, dtype, trajectory: Float[Array, " K N D"] | None = None, base_state: PyTree = None) -> "SolverState":
        """The state before the first window."""
        return cls(WindowStatistics.zero(dtype), jnp.array(jnp.nan, dtype), trajectory, base_state)

    def at(self, t0: Float[ArrayLike, ""], made_jump: Bool[ArrayLike, ""], base_state: PyTree = None) -> "SolverState":
        """The state before a window that begins at `t0`: this one if the last window ended there, else a new one with the
        given `base_state`."""
        dtype = jnp.result_type(self.end)
        # At a jump, Diffrax moves the time a little.
        continues = made_jump | (jnp.asarray(t0, dtype) == self.end)
        new = SolverState.start(dtype, self.trajectory, base_state)
        return jtu.tree_map(lambda old, new: jnp.where(continues, old, new), self, new)

    def next_trajectory(self) -> Float[Array, " N D"] | None:
        """The stored states of the next window; NaN where none are stored."""
        if self.trajectory is None:
            return None
        capacity, index = self.trajectory.shape[0], self.statistics.windows
        return jnp.where(index < capacity, self.trajectory[jnp.minimum(index, capacity - 1)], jnp.nan)

    def after(
        self, statistics: WindowStatistics, t1: Float[ArrayLike, ""], y: Float[Array, " N D"], base_state: PyTree
    ) -> "SolverState":
        """The state after one more window.

        **Arguments:** the statistics after the window; its end; its states, or NaN; the base solver's state at the end.
        """
        trajectory = self.trajectory
        if trajectory is not None:
            trajectory = trajectory.at[self.statistics.windows].set(y, mode="drop")
        return SolverState(statistics, jnp.asarray(t1, jnp.result_type(self.end)), trajectory, base_state)


def statistics(sol: dfx.Solution) -> WindowStatistics:
    """What a solve by `ParallelSolver` did: iterations, steps solved in parallel, steps made sequentially, and more.

    ```python
    sol = diffrax.diffeqsolve(
        term, pdx.ParallelSolver(diffrax.Tsit5(), num_steps=4096), t0, t1, dt0, y0,
        saveat=diffrax.SaveAt(t1=True, solver_state=True),
    )
    print(pdx.statistics(sol))
    ```

    **Arguments:**

    - `sol`: the solution of `diffeqsolve(..., solver=ParallelSolver(...), saveat=SaveAt(..., solver_state=True))`, or a
        batch of them from `jax.vmap`.

    **Returns:** a `WindowStatistics`. For a batch, each entry has the axes of the batch.

    **Cost:** none.

    **Raises:** `TypeError` if `sol` is not a `diffrax.Solution` or is of another solver; `ValueError` if it has no solver
    state.
    """
    call = "`statistics(sol)`"
    if not isinstance(sol, dfx.Solution):
        raise TypeError(f"{call}: expected the solution of `diffrax.diffeqsolve`, got {type(sol).__name__}.")
    if sol.solver_state is None:
        raise ValueError(
            f"{call}: the solution has no solver state. Pass `SaveAt(..., solver_state=True)` to "
            "`diffeqsolve(..., solver=ParallelSolver(...))`."
        )
    if not isinstance(sol.solver_state, SolverState):
        raise TypeError(
            f"{call}: expected a solution of `diffeqsolve(..., solver=ParallelSolver(...))`, got the solver state "
            f"`{type(sol.solver_state).__name__}` of another solver."
        )
    return sol.solver_state.statistics
