"""Newton's method on all steps of a recurrence at once."""

from collections.abc import Callable

import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, PyTree

from .._scan import AbstractScan, AutoScan, row_at, shift, with_row
from ._jacobians import AbstractJacobian, Dense
from ._root_finder import AbstractParallelRootFinder
from ._tolerance import num_leading_true


def safeguarded_update(
    y: Float[Array, " N D"],
    r: Float[Array, " N D"],
    finite_transitions: Bool[Array, " N"],
    d: Float[Array, " N D"],
    largest: Float[Array, ""],
) -> tuple[Float[Array, " N D"], Bool[Array, " N"]]:
    """Applies the update `d` to the leading steps on which it is finite and not too large.

    A later state is updated too if its own update is finite and not too large, and the step from it is finite. All other
    states are set to the last of the leading ones, as a new guess. (On ten recurrences from constant guesses this converges
    on all. Three alternatives each fail on most: to keep the old states, to clip the updates, to take one step from each
    state.)

    **Arguments:**

    - `y`, `r`: the states, and the residual at them, both of shape `(N, D)`.
    - `finite_transitions`: whether the transitions of each step are finite, shape `(N,)`.
    - `d`: the update, shape `(N, D)`.
    - `largest`: the largest magnitude of an entry of the update.

    **Returns:** the new states, and the leading steps to which `d` was applied.
    """
    stepped = y + d
    sane = jnp.all(jnp.isfinite(stepped) & (jnp.abs(d) <= largest), axis=1)
    num_applied = num_leading_true(sane)
    applied = jnp.arange(y.shape[0]) < num_applied
    # A state from which the step is not finite is not usable either.
    usable = finite_transitions & jnp.all(jnp.isfinite(r), axis=1)
    usable = with_row(shift(usable, -1), -1, True)
    last = jnp.where(num_applied == 0, y[0], row_at(stepped, jnp.maximum(num_applied, 1) - 1))
    kept = jnp.where((sane & usable)[:, None], stepped, last[None])
    return jnp.where(applied[:, None], stepped, kept), applied


class ParallelNewton(AbstractParallelRootFinder):
    """Newton's method on all steps of a recurrence at once, each iteration one associative scan.

    Use it as the root finder of `ParallelSolver` and `parallel_scan`, or with `optimistix.root_find(fn, ParallelNewton(),
    y0)` for any `fn(y, args)` that returns the residual of a recurrence. `y` and the residual are then pytrees whose leading
    axis has length `N`. From a good guess it takes a handful of iterations. From a poor one, `ELK` is safer.

    For `r[i](y) = F[i](y[i-1]) - y[i]` with Jacobians `A[i]` of the steps, an iteration solves

        d[i] = A[i] d[i-1] + r[i],   d[-1] = 0,       y <- y + d

    in `O(log N)` depth. After `k` iterations the first `k` steps are exact, whatever the guess.

    If rounding keeps the update above the tolerance, as it can in float32 over long times, the iteration has converged once
    the update stops falling, is below half the digits, and every step's equation holds to rounding. No sequential solve
    could do better. Every iterate is finite. A state is replaced by the last good state before the first failure, as a new
    guess, if its update is not finite or is absurdly large, or if the step from it is not finite.

    **Arguments:**

    - `rtol`, `atol`: the iteration has converged when every entry of the last update is at most `atol + rtol * scale`, where
        `scale` is the largest magnitude of the component up to that time. The answer includes that update, so that the error
        of Newton's method is about its square. With an approximate Jacobian convergence is linear. Then the sum of all later
        updates, at the rate measured from the last two, must be that small, and so must the sum of the defects. `rtol` below
        four times the machine epsilon has no effect.
    - `norm`: a norm of one step's scaled update. Its maximum over all steps must be at most 1.
    - `jacobian`: replaces `A`. The default, `Dense()`, gives Newton's method; `Diagonal()`, `Hutchinson(...)` and
        `BlockDiagonal(...)` give quasi-Newton methods, `Identity()` Picard iteration, `Zero()` Jacobi iteration;
        `Scaled(...)` and `Clipped(...)` reduce another Jacobian.
    - `scan`: evaluates the linear recurrence. The default, `AutoScan()`, chooses by device and size: sequential on a CPU;
        Kogge-Stone, blocked or in kernels on a GPU. `ShardedScan(mesh)` spreads all work on the steps over devices.

    **Results:** `successful` under one of the two conditions above. `nonlinear_divergence` if neither the update falls nor
    the number of converged steps grows; with an approximate Jacobian, if the first step that has not converged cannot be
    evaluated. `nonlinear_max_steps_reached`. A NaN is never a success.

    **Statistics:** `optimistix.Solution.stats["report"]` is a `SolveReport`. `options={"request": SolveRequest(...)}` sets
    the machine epsilon of the states, and can confine the iteration to the leading steps on which it contracts. Both are in
    `parallel_diffrax.root_finders`.

    **Cost:** per iteration with `Dense()`: `D` Jacobian-vector products of a step, and `D^3` multiplications a step; memory
    `N D^2`; depth `2 log2 N`. With diagonal approximations: `D` multiplications a step; memory of about ten `N D`.

    **Raises:** `ValueError` for tolerances out of range and for a `fn` that is not the residual of a recurrence; `TypeError`
    for a `norm`, `jacobian` or `scan` of another kind.

    ??? cite "References"

        Lim et al., "Parallelizing non-linear sequential models over the sequence length", arXiv 2309.12252 (2023).

        Gonzalez, "Parallel Newton methods", arXiv 2603.16850 (2026).
    """

    rtol: float | Float[Array, ""] = 1e-8
    atol: float | Float[Array, ""] = 0.0
    norm: Callable[[PyTree], Float[Array, ""]] = optx.max_norm
    jacobian: AbstractJacobian = Dense()
    scan: AbstractScan = AutoScan()

    @property
    def exact(self):
        return self.jacobian.exact

    def iterate(self, residual, r, transitions, y, tolerance, largest, method_state):
        del residual, tolerance
        d = self.scan.solve(transitions, r)
        y, applied = safeguarded_update(y, r, transitions.finite(), d, largest)
        return y, d, applied, method_state
