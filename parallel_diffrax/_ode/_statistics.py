"""What a solve counted."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from .._recurrence import Counts


class WindowStatistics(eqx.Module):
    """The solver state of `ParallelSolver`: what happened in the accepted windows so far. Read it as
    `sol.solver_state` after `diffeqsolve(..., saveat=SaveAt(..., solver_state=True))`.

    **Attributes:**

    - `windows`: the number of accepted windows.
    - `cut_windows`: those that were cut: solved in parallel in several stretches.
    - `sequential_windows`: those of which more than half the steps were made in sequence.
    - `attempts`: stretches of steps that the root finder was put on: one a window if none was cut.
    - `iterations`: of the root finder, over all attempts of all accepted windows.
    - `predicted_iterations`: how many were expected after the first of each attempt.
    - `max_iterations`: the most that one window took.
    - `parallel_steps`: fine steps that the root finder solved.
    - `sequential_steps`: fine steps that it did not, made one after the other.
    - `predictor_steps`: steps made in sequence for the first guesses.
    - `residual`: the largest relative defect of any parallel step.
    - `growth`: the logarithm of the factor by which a random perturbation grows, summed over windows, estimated from the
        Jacobians at first guesses: above about 30 in double precision, the end of a trajectory is beyond prediction by
        any method, and only its steps are right. NaN where no policy asked.
    - `duration`: the time covered.
    - `memory`: the base solver's own state at the end of the last window, where its steps depend on one; else `None`.
    """

    windows: Int[ArrayLike, ""]
    cut_windows: Int[ArrayLike, ""]
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
    memory: PyTree = None

    def __str__(self) -> str:
        names = [field.name for field in dataclasses.fields(self) if field.name != "memory"]
        return "\n".join(f"{name}: {getattr(self, name)}" for name in [*names, "lyapunov"])

    @property
    def lyapunov(self) -> Float[Array, ""]:
        """The estimated largest Lyapunov exponent over the time covered, per unit of time: `growth / duration`."""
        return jnp.asarray(self.growth) / self.duration

    @classmethod
    def start(cls, dtype, memory: PyTree = None) -> "WindowStatistics":
        """Before the first window."""
        numbers = {"residual", "growth", "duration"}
        names = [field.name for field in dataclasses.fields(cls) if field.name != "memory"]
        zeros = {name: jnp.array(0, dtype) if name in numbers else jnp.array(0) for name in names}
        return cls(**zeros, memory=memory)

    def add(
        self, counts: Counts, num_steps: int, duration: Float[Array, ""], memory: PyTree = None
    ) -> "WindowStatistics":
        """After one more window, of so many steps and so long, with that memory at its end."""
        dtype = jnp.result_type(self.residual)
        sequential = num_steps - counts.parallel_steps
        mostly_sequential = 2 * sequential > num_steps
        return WindowStatistics(
            windows=self.windows + 1,
            cut_windows=self.cut_windows + ((counts.attempts > 1) & ~mostly_sequential),
            sequential_windows=self.sequential_windows + mostly_sequential,
            attempts=self.attempts + counts.attempts,
            iterations=self.iterations + counts.iterations,
            predicted_iterations=self.predicted_iterations + counts.predicted_iterations,
            max_iterations=jnp.maximum(self.max_iterations, counts.iterations),
            parallel_steps=self.parallel_steps + counts.parallel_steps,
            sequential_steps=self.sequential_steps + sequential,
            predictor_steps=self.predictor_steps + counts.guess_steps,
            residual=jnp.maximum(self.residual, counts.residual.astype(dtype)),
            growth=self.growth + counts.growth_over(num_steps).astype(dtype),
            duration=self.duration + jnp.abs(duration).astype(dtype),
            memory=memory,
        )
