"""The statistics of a solve."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

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
    - `sequential_steps`: the other fine steps, made sequentially.
    - `predictor_steps`: steps that first guesses made sequentially.
    - `residual`: the largest relative defect of a parallel step.
    - `growth`: the logarithm of the growth of a random perturbation, by the Jacobians along the solution, summed over
        windows. Above about 30 in double precision, no method can predict the end of the trajectory, and only its steps are
        right. NaN if the policy does not estimate it.
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
        self, counts: Counts, num_steps: int, count: Int[ArrayLike, ""], duration: Float[ArrayLike, ""]
    ) -> "WindowStatistics":
        """The statistics after one more window.

        **Arguments:** the work; the number of steps in the arrays; the number of those that do not have length zero; the
        length of the window, of either sign.
        """
        dtype = jnp.result_type(self.residual)
        parallel = jnp.minimum(counts.parallel_steps, count)
        sequential = count - parallel
        mostly_sequential = 2 * sequential > count
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
            duration=self.duration + jnp.abs(duration).astype(dtype),
        )
