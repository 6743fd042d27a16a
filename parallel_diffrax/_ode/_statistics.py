"""What a solve counted."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from .._recurrence import RecurrenceSolution


class WindowStatistics(eqx.Module):
    """The solver state of `ParallelSolver`: what happened in the accepted windows so far. Read it as
    `sol.solver_state` after `diffeqsolve(..., saveat=SaveAt(..., solver_state=True))`.

    **Attributes:**

    - `windows`: the number of accepted windows.
    - `iterations`: of the root finder, over all accepted windows.
    - `max_iterations`: the most that one window took.
    - `parallel_steps`: fine steps that the root finder solved.
    - `sequential_steps`: fine steps that it did not, left to the fallback.
    - `predictor_steps`: steps made in sequence for the first guesses.
    - `residual`: the largest relative defect of any parallel step.
    """

    windows: Int[ArrayLike, ""]
    iterations: Int[ArrayLike, ""]
    max_iterations: Int[ArrayLike, ""]
    parallel_steps: Int[ArrayLike, ""]
    sequential_steps: Int[ArrayLike, ""]
    predictor_steps: Int[ArrayLike, ""]
    residual: Float[ArrayLike, ""]

    def __str__(self) -> str:
        return "\n".join(f"{field.name}: {getattr(self, field.name)}" for field in dataclasses.fields(self))

    @classmethod
    def start(cls, dtype) -> "WindowStatistics":
        """Before the first window."""
        zero = jnp.array(0)
        return cls(zero, zero, zero, zero, zero, zero, jnp.array(0, dtype))

    def add(self, solution: RecurrenceSolution, predictor_steps: Int[Array, ""]) -> "WindowStatistics":
        """After one more window."""
        num_steps = solution.y.shape[0]
        residual = solution.residual.astype(jnp.result_type(self.residual))
        return WindowStatistics(
            windows=self.windows + 1,
            iterations=self.iterations + solution.iterations,
            max_iterations=jnp.maximum(self.max_iterations, solution.iterations),
            parallel_steps=self.parallel_steps + solution.parallel_steps,
            sequential_steps=self.sequential_steps + num_steps - solution.parallel_steps,
            predictor_steps=self.predictor_steps + predictor_steps,
            residual=jnp.maximum(self.residual, residual),
        )
