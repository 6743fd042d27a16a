"""What a solve counted."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._recurrence import Counts


# What is handed from window to window, and counts nothing.
_CARRIED = ("end", "trajectory", "memory")


class WindowStatistics(eqx.Module):
    """The solver state of `ParallelSolver`: what happened in the accepted windows of a solve. Read it as
    `sol.solver_state` after `diffeqsolve(..., saveat=SaveAt(..., solver_state=True))`.

    It may be handed to a later solve, `diffeqsolve(..., solver_state=sol.solver_state)`; a `WarmStart` predictor then
    begins with the trajectory that is in it. A solve that starts at the time at which this one ended goes on counting; one
    that starts at any other time counts from zero.

    **Attributes:**

    - `windows`: the number of accepted windows.
    - `split_windows`: those that were cut: solved in parallel in several segments.
    - `sequential_windows`: those of which more than half the steps were made in sequence.
    - `attempts`: segments of steps that the root finder was put on: one a window if none was cut.
    - `iterations`: of the root finder, over all attempts of all accepted windows.
    - `predicted_iterations`: how many were expected after the first of each attempt.
    - `max_iterations`: the most that one window took.
    - `parallel_steps`: fine steps that the root finder solved.
    - `sequential_steps`: fine steps that it did not, made one after the other.
    - `predictor_steps`: steps made in sequence for the first guesses.
    - `residual`: the largest relative defect of any parallel step.
    - `growth`: the logarithm of the factor by which a random perturbation grows, summed over windows, by the Jacobians along
        the solution: above about 30 in double precision, the end of a trajectory is beyond prediction by
        any method, and only its steps are right. NaN where no policy asked.
    - `duration`: the time covered.
    - `end`: where the last window ended, in Diffrax's own time, which increases.
    - `trajectory`: the states of the fine steps of the first windows, one vector a step, shape `(windows, N, D)`, without
        derivatives, if the predictor asks for them (`WarmStart`); NaN for a window that was not made or failed.
    - `memory`: the base solver's own state at the end of the last window, where its steps depend on one; else `None`.
    """

    windows: Int[ArrayLike, ""]
    split_windows: Int[ArrayLike, ""]
    sequential_windows: Int[ArrayLike, ""]
    attempts: Int[ArrayLike, ""]
    iterations: Int[ArrayLike, ""]
    predicted_iterations: Int[ArrayLike, ""]
    max_iterations: Int[ArrayLike, ""]
    parallel_steps: Int[ArrayLike, ""]
    sequential_steps: Int[ArrayLike, ""]
    predictor_steps: Int[ArrayLike, ""]
    residual: Float[ArrayLike, ""]
    growth: Float[ArrayLike, ""]
    duration: Float[ArrayLike, ""]
    end: Float[ArrayLike, ""]
    trajectory: Float[ArrayLike, " K N D"] | None = None
    memory: PyTree = None

    def __str__(self) -> str:
        names = [field.name for field in dataclasses.fields(self) if field.name not in _CARRIED]
        return "\n".join(f"{name}: {getattr(self, name)}" for name in [*names, "lyapunov"])

    @property
    def lyapunov(self) -> Float[Array, ""]:
        """The estimated largest Lyapunov exponent over the time covered, per unit of time: `growth / duration`."""
        return jnp.asarray(self.growth) / self.duration

    @classmethod
    def start(
        cls, dtype, trajectory: Float[Array, " K N D"] | None = None, memory: PyTree = None
    ) -> "WindowStatistics":
        """Before the first window."""
        numbers = {"residual", "growth", "duration"}
        names = [field.name for field in dataclasses.fields(cls) if field.name not in _CARRIED]
        # Types that are not weak, as those of a state that a solve returns: one program serves for both.
        counts = {name: jnp.array(0, dtype if name in numbers else jnp.result_type(int)) for name in names}
        return cls(**counts, end=jnp.array(jnp.nan, dtype), trajectory=trajectory, memory=memory)

    def at(self, t0: Float[ArrayLike, ""], made_jump: Bool[ArrayLike, ""], memory: PyTree = None) -> "WindowStatistics":
        """Before a window that starts at `t0`: from zero, with a new `memory`, unless that is where the last one ended. (At
        a jump, Diffrax moves the time a little.)"""
        dtype = jnp.result_type(self.residual)
        goes_on = made_jump | (jnp.asarray(t0, dtype) == self.end)
        trajectory = None if self.trajectory is None else jnp.asarray(self.trajectory)
        zero = WindowStatistics.start(dtype, trajectory, memory)
        return jtu.tree_map(lambda old, new: jnp.where(goes_on, old, new), self, zero)

    def remembered(self) -> Float[Array, " N D"] | None:
        """What is known of the trajectory of the next window."""
        if self.trajectory is None:
            return None
        trajectory = jnp.asarray(self.trajectory)
        capacity, index = trajectory.shape[0], jnp.asarray(self.windows)
        return jnp.where(index < capacity, trajectory[jnp.minimum(index, capacity - 1)], jnp.nan)

    def add(
        self,
        counts: Counts,
        num_steps: int,
        count: Int[ArrayLike, ""],
        t0: Float[Array, ""],
        t1: Float[Array, ""],
        y: Float[Array, " N D"],
        memory: PyTree = None,
    ) -> "WindowStatistics":
        """After one more window, from `t0` to `t1`.

        **Arguments:** the work; the number of steps in the arrays, and of those that were not of length zero; the time; the
        states, or NaN; the base solver's memory at the end.
        """
        dtype = jnp.result_type(self.residual)
        parallel = jnp.minimum(counts.parallel_steps, count)
        sequential = count - parallel
        mostly_sequential = 2 * sequential > count
        trajectory = self.trajectory
        if trajectory is not None:
            trajectory = jnp.asarray(trajectory).at[self.windows].set(y, mode="drop")
        return WindowStatistics(
            windows=self.windows + 1,
            split_windows=self.split_windows + ((counts.attempts > 1) & ~mostly_sequential),
            sequential_windows=self.sequential_windows + mostly_sequential,
            attempts=self.attempts + counts.attempts,
            iterations=self.iterations + counts.iterations,
            predicted_iterations=self.predicted_iterations + counts.predicted_iterations,
            max_iterations=jnp.maximum(self.max_iterations, counts.iterations),
            parallel_steps=self.parallel_steps + parallel,
            sequential_steps=self.sequential_steps + sequential,
            predictor_steps=self.predictor_steps + counts.predictor_steps,
            residual=jnp.maximum(self.residual, counts.residual.astype(dtype)),
            growth=self.growth + counts.growth_over(num_steps).astype(dtype),
            duration=self.duration + jnp.abs(t1 - t0).astype(dtype),
            end=jnp.asarray(t1, dtype),
            trajectory=trajectory,
            memory=memory,
        )
