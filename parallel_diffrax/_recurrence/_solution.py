"""The result of a solve of a recurrence, and the work that it took."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int


# Number of attempts that are listed one by one.
_LISTED = 64


class Segments(eqx.Module):
    """The first attempts of a solve, one by one, in the order in which they were made: all arrays have the shape `(64,)`,
    with zeros after the last attempt. They are of floating-point numbers, since Diffrax fills what it has no values for with
    infinity.

    **Attributes:**

    - `start`, `num_solved`: the first step of the attempt, and how many steps from there on it solved in parallel.
    - `iterations`: the number of iterations of the root finder.
    - `growth`: the logarithm of the growth of a random perturbation over the solved steps. NaN if unknown.
    """

    start: Float[Array, " *W K"]
    num_solved: Float[Array, " *W K"]
    iterations: Float[Array, " *W K"]
    growth: Float[Array, " *W K"]

    @classmethod
    def none(cls) -> "Segments":
        """The list before the first attempt."""
        zeros = jnp.zeros(_LISTED, jnp.float32)
        return cls(zeros, zeros, zeros, zeros)

    @classmethod
    def one(cls, start, num_solved, iterations, growth) -> "Segments":
        """The list of one attempt."""
        first = lambda x: jnp.zeros(_LISTED, jnp.float32).at[0].set(jnp.asarray(x, jnp.float32))
        return cls(first(start), first(num_solved), first(iterations), first(growth))

    def add(self, other: "Segments", index: Int[Array, ""]) -> "Segments":
        """The list with the first attempt of `other` as number `index`. Those beyond its length are not listed."""
        here = jnp.arange(_LISTED, dtype=index.dtype) == index
        return jtu.tree_map(lambda x, new: jnp.where(here, new[0], x), self, other)


class Counts(eqx.Module):
    """The work of one or several attempts. An attempt is one solve of a segment of steps in parallel.

    **Attributes:**

    - `attempts`, `iterations`: the numbers of attempts, and of iterations of the root finder.
    - `predicted_iterations`: the number of iterations, as predicted after the first of each attempt.
    - `parallel_steps`, `predictor_steps`: the numbers of steps solved in parallel, and made sequentially by first guesses.
    - `residual`: the largest defect `|F(y[i-1]) - y[i]|` of the solved steps, relative to the largest value that the
        component has had so far.
    - `growth`: the logarithm of the growth of a random perturbation over the solved steps, summed over attempts. NaN if the
        Jacobians are approximate or growth was not monitored.
    - `first_rate`: the growth per step in the first attempt.
    - `in_kernel`: whether sequential steps, if there are any, are made by a kernel. `solve_recurrence` sets it.
    - `segments`: the first attempts, one by one.
    """

    attempts: Int[Array, ""]
    iterations: Int[Array, ""]
    predicted_iterations: Int[Array, ""]
    parallel_steps: Int[Array, ""]
    predictor_steps: Int[Array, ""]
    residual: Float[Array, ""]
    growth: Float[Array, ""]
    first_rate: Float[Array, ""]
    in_kernel: Bool[Array, ""]
    segments: Segments

    @classmethod
    def none(cls, dtype) -> "Counts":
        """The counts before the first attempt."""
        zero, no_number = jnp.array(0), jnp.array(0, dtype)
        # Not NaN, which would stop a healthy solve under `jax_debug_nans`.
        unknown, no = jnp.array(jnp.inf, dtype), jnp.array(False)
        return cls(zero, zero, zero, zero, zero, no_number, no_number, unknown, no, Segments.none())

    def add(self, other: "Counts") -> "Counts":
        """The counts including those of one more attempt."""
        first_rate = jnp.where(self.attempts == 0, other.first_rate, self.first_rate)
        residual = jnp.maximum(self.residual, other.residual)
        segments = self.segments.add(other.segments, self.attempts)
        changed = dict(residual=residual, first_rate=first_rate, segments=segments)
        return dataclasses.replace(jtu.tree_map(jnp.add, self, other), **changed)

    def growth_over(self, num_steps: int) -> Float[Array, ""]:
        """The growth over `num_steps` steps at the mean rate of the solved steps. If none was solved, at the rate of the
        first attempt."""
        rate = self.growth / jnp.maximum(self.parallel_steps, 1).astype(self.growth.dtype)
        return num_steps * jnp.where(self.parallel_steps > 0, rate, self.first_rate)


class RecurrenceSolution(eqx.Module):
    """All steps of a recurrence. A policy returns one, and `solve_recurrence` completes it.

    **Attributes:**

    - `y`: the states, shape `(N, D)`. After `solve_recurrence` they are differentiable in everything that the recurrence
        depends on.
    - `finite`: the steps whose state and defect are finite, shape `(N,)`. A policy need not look at the states:
        `solve_recurrence` excludes those that are not finite.
    - `finished`: whether every step was solved in parallel or made sequentially, finite or not.
    - `result`: `successful` only if `finished`. After `solve_recurrence` every state is finite too.
    - `counts`: the work in parallel. Steps that were not solved in parallel were left to the policy.
    - `all_finite`: whether all states are finite; `None` lets `solve_recurrence` look at each.
    - `sequential`: whether it is known when a program is traced that all steps are made sequentially.
    """

    y: Float[Array, " N D"]
    finite: Bool[Array, " N"]
    finished: Bool[Array, ""]
    result: optx.RESULTS
    counts: Counts
    all_finite: Bool[Array, ""] | None = None
    sequential: bool = eqx.field(static=True, default=False)

    @classmethod
    def complete(
        cls,
        y: Float[Array, " N D"],
        counts: Counts,
        all_finite: Bool[Array, ""] | None = None,
        sequential: bool = False,
    ) -> "RecurrenceSolution":
        """The solution of a policy that solved or made every step."""
        made = jnp.ones(y.shape[0], bool)
        return cls(y, made, jnp.array(True), optx.RESULTS.successful, counts, all_finite, sequential)

    def with_all_finite(self) -> "RecurrenceSolution":
        """The same solution, with all that policies may leave out, so that those of two policies are alike."""
        all_finite = jnp.all(jnp.isfinite(self.y)) if self.all_finite is None else self.all_finite
        return jtu.tree_map(jnp.asarray, dataclasses.replace(self, all_finite=all_finite, sequential=False))
