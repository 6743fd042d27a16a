"""What a `ParallelSolver` carries from window to window, and the statistics in it."""

import dataclasses

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._recurrence import Counts


# The statistics that are not integers.
_REAL = ("residual", "growth", "duration")


class WindowStatistics(eqx.Module):
    """What `ParallelSolver` did in the accepted windows of a solve. `parallel_diffrax.statistics(sol)` returns it, and
    `print` shows it.

    A solve that continues from the `solver_state` of another at the time where that one ended continues its statistics.

    **Attributes:** scalars; with the axes of the batch under `jax.vmap`.

    - `windows`: the number of accepted windows.
    - `split_windows`: windows solved in several segments.
    - `sequential_windows`: windows in which more than half of the steps were made sequentially.
    - `attempts`: segments that the root finder attempted. A window that was not split has one attempt.
    - `iterations`: iterations of the root finder, over all attempts.
    - `predicted_iterations`: the number of iterations predicted after the first one of each attempt.
    - `max_iterations`: the largest number of iterations of one window.
    - `parallel_steps`: fine steps that the root finder solved.
    - `sequential_steps`: the other fine steps, made sequentially. Under an adaptive step-size controller whose own steps are
        made, the default, these are the steps that it accepted.
    - `rejected_steps`: the steps that it rejected. Zero under any other policy or controller.
    - `kernel_steps`: those of the sequential steps that a kernel made. XLA made the others.
    - `predictor_steps`: steps that first guesses made sequentially.
    - `residual`: the largest relative defect of a parallel step.
    - `growth`: the logarithm of the growth of a random perturbation, by the Jacobians along the solution, summed over
        windows. Above about 30 in double precision, no method can predict the end of the trajectory, and only its steps are
        right. Infinite if all steps were made sequentially, NaN if Jacobians are approximate.
    - `duration`: the length of the solved time span.
    """

    windows: Int[Array, ""]
    split_windows: Int[Array, ""]
    sequential_windows: Int[Array, ""]
    attempts: Int[Array, ""]
    iterations: Int[Array, ""]
    predicted_iterations: Int[Array, ""]
    max_iterations: Int[Array, ""]
    parallel_steps: Int[Array, ""]
    sequential_steps: Int[Array, ""]
    rejected_steps: Int[Array, ""]
    kernel_steps: Int[Array, ""]
    predictor_steps: Int[Array, ""]
    residual: Float[Array, ""]
    growth: Float[Array, ""]
    duration: Float[Array, ""]

    def __str__(self) -> str:
        names = [field.name for field in dataclasses.fields(self)]
        return "\n".join(f"{name}: {getattr(self, name)}" for name in [*names, "lyapunov"])

    @property
    def lyapunov(self) -> Float[Array, "..."]:
        """The estimated largest Lyapunov exponent per unit of time, `growth / duration`."""
        return self.growth / self.duration

    @classmethod
    def zero(cls, dtype) -> "WindowStatistics":
        """The statistics before the first window."""
        # No weak types: one compiled program then serves for the first and for later solves.
        integer = jnp.result_type(int)
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: jnp.array(0, dtype if name in _REAL else integer) for name in names})

    def add(
        self,
        counts: Counts,
        num_steps: int,
        count: Int[ArrayLike, ""],
        duration: Float[ArrayLike, ""],
        rejected: Int[ArrayLike, ""] = 0,
    ) -> "WindowStatistics":
        """The statistics after one more window. `num_steps` is the length of its arrays, `count` the number of steps that do
        not have length zero, `duration` the length of the window, of either sign, `rejected` the number of steps that the
        controller rejected."""
        count = jnp.asarray(count, counts.parallel_steps.dtype)
        parallel = jnp.minimum(counts.parallel_steps, count)
        mostly_sequential = 2 * (count - parallel) > count

        def combined(combine, **values):
            old = {name: getattr(self, name) for name in values}
            return {name: combine(old[name], jnp.asarray(x, old[name].dtype)) for name, x in values.items()}

        sums = combined(
            jnp.add,
            windows=1,
            split_windows=(counts.attempts > 1) & ~mostly_sequential,
            sequential_windows=mostly_sequential,
            attempts=counts.attempts,
            iterations=counts.iterations,
            predicted_iterations=counts.predicted_iterations,
            parallel_steps=parallel,
            sequential_steps=count - parallel,
            rejected_steps=rejected,
            kernel_steps=jnp.where(counts.in_kernel, count - parallel, 0),
            predictor_steps=counts.predictor_steps,
            growth=counts.growth_over(num_steps),
            duration=jnp.abs(duration),
        )
        return WindowStatistics(
            **sums, **combined(jnp.maximum, max_iterations=counts.iterations, residual=counts.residual)
        )


class Pace(eqx.Module):
    """With which step an adaptive solve goes on: its `length`, zero if unknown, and the controller's own `state`."""

    length: Float[Array, ""]
    state: PyTree

    def unknown(self) -> "Pace":
        """A pace of this structure that no solve goes on with."""
        return jtu.tree_map(jnp.zeros_like, self)

    def like(self, other: "Pace") -> bool:
        """Whether both are of controllers with the same kind of state."""
        kinds = lambda tree: [(jnp.shape(x), jnp.result_type(x)) for x in jtu.tree_leaves(tree)]
        return jtu.tree_structure(self) == jtu.tree_structure(other) and kinds(self) == kinds(other)


class SolverState(eqx.Module):
    """The solver state of `ParallelSolver`, which a later solve may be given: `diffeqsolve(..., solver_state=...)`.

    A `WarmStart` predictor then begins with the stored trajectory. A solve that begins at `end` continues the statistics.
    Any other solve counts from zero.
    """

    statistics: WindowStatistics
    # The end of the last window, in Diffrax's internal time, which increases.
    end: Float[Array, ""]
    # The raveled states of the first `K` windows, without derivatives; infinite for a window that was not made or failed.
    # `None` unless the predictor asks for it.
    trajectory: Float[Array, " K N D"] | None = None
    # The base solver's own state at `end`, if its steps depend on one.
    base_state: PyTree = None
    # With which step to go on, if a controller chooses each. `None` if the policy does not let it.
    pace: Pace | None = None

    @classmethod
    def start(
        cls,
        dtype,
        trajectory: Float[Array, " K N D"] | None = None,
        base_state: PyTree = None,
        pace: Pace | None = None,
    ) -> "SolverState":
        """The state before the first window."""
        # Infinite, not NaN, which would stop a healthy solve under `jax_debug_nans`.
        return cls(WindowStatistics.zero(dtype), jnp.array(jnp.inf, dtype), trajectory, base_state, pace)

    def at(
        self,
        t0: Float[ArrayLike, ""],
        made_jump: Bool[ArrayLike, ""],
        base_state: PyTree = None,
        pace: Pace | None = None,
    ) -> "SolverState":
        """The state before a window that begins at `t0`: this one if the last window ended there, else a new one with the
        given `base_state` and `pace`. Its pace is `None` if none is given, and the given one if that of this state is
        unknown or of another kind of controller."""
        dtype = jnp.result_type(self.end)
        # At a jump, Diffrax moves the time a little.
        continues = made_jump | (jnp.asarray(t0, dtype) == self.end)
        select = lambda pred, old, new: jtu.tree_map(lambda old, new: jnp.where(pred, old, new), old, new)
        if pace is not None and self.pace is not None and self.pace.like(pace):
            pace = select(continues & (self.pace.length > 0), self.pace, pace)
        old = SolverState(self.statistics, self.end, self.trajectory, self.base_state)
        chosen = select(continues, old, SolverState.start(dtype, self.trajectory, base_state))
        return dataclasses.replace(chosen, pace=pace)

    def next_trajectory(self) -> Float[Array, " N D"] | None:
        """The stored states of the next window; infinite where none are stored."""
        if self.trajectory is None:
            return None
        capacity, index = self.trajectory.shape[0], self.statistics.windows
        return jnp.where(index < capacity, self.trajectory[jnp.minimum(index, capacity - 1)], jnp.inf)

    def after(
        self,
        statistics: WindowStatistics,
        t1: Float[ArrayLike, ""],
        y: Float[Array, " N D"] | None,
        base_state: PyTree,
        pace: Pace | None = None,
    ) -> "SolverState":
        """The state after one more window, which ends at `t1`. `y` are its states, or infinite; unused if none are
        stored."""
        trajectory = self.trajectory
        if trajectory is not None:
            trajectory = trajectory.at[self.statistics.windows].set(y, mode="drop")
        return SolverState(statistics, jnp.asarray(t1, jnp.result_type(self.end)), trajectory, base_state, pace)


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

    - `sol`: the solution of `diffeqsolve(..., solver=ParallelSolver(...), saveat=SaveAt(..., solver_state=True))`, or of any
        `parallel_diffrax.diffeqsolve(...)` that was not left to Diffrax; or a batch of them from `jax.vmap`.

    **Returns:** a `WindowStatistics`. For a batch, each entry has the axes of the batch.

    **Cost:** none.

    **Raises:** `TypeError` if `sol` is not a `diffrax.Solution` or is of another solver; `ValueError` if it has no solver
    state.
    """
    call = "`statistics(sol)`"
    if not isinstance(sol, dfx.Solution):
        raise TypeError(f"{call}: expected the solution of `diffrax.diffeqsolve`, got {type(sol).__name__}.")
    # `parallel_diffrax.diffeqsolve` puts them there.
    if isinstance(sol.stats.get("windows"), WindowStatistics):
        return sol.stats["windows"]
    if sol.solver_state is None:
        raise ValueError(
            f"{call}: the solution has no solver state. Pass `SaveAt(..., solver_state=True)` to "
            "`diffeqsolve(..., solver=ParallelSolver(...))`. (A solve that our `diffeqsolve` left to Diffrax has none.)"
        )
    if not isinstance(sol.solver_state, SolverState):
        raise TypeError(
            f"{call}: expected a solution of `diffeqsolve(..., solver=ParallelSolver(...))`, got the solver state "
            f"`{type(sol.solver_state).__name__}` of another solver."
        )
    return sol.solver_state.statistics
