"""Newton's method on all steps of a recurrence at once."""

from collections.abc import Callable

import optimistix as optx
from jaxtyping import Array, Float, PyTree

from .._scan import AbstractScan, AutoScan
from ._jacobian import AbstractJacobian, Dense
from ._root_finder import AbstractParallelRootFinder, safeguarded_update


class ParallelNewton(AbstractParallelRootFinder):
    """Solves all steps of a recurrence together by Newton's method, each iteration one associative scan.

    For `r[i](y) = F[i](y[i-1]) - y[i]` with Jacobians `A[i]` of the steps, an iteration is

        d[i] = A[i] d[i-1] + r[i],   d[-1] = 0,       y <- y + d,

    which is solved in `O(log N)` depth. After `k` iterations the first `k` steps are exact whatever the guess;
    from a good guess it takes a handful of iterations.

    It runs as the root finder of `parallel_diffrax.ParallelSolver` and `parallel_diffrax.parallel_scan`, and under
    `optimistix.root_find(fn, ParallelNewton(), y0)` for any `fn(y, args)` that returns such a residual: `y` and the
    residual are pytrees whose leading axis is the `N` steps.

    **Arguments:**

    - `rtol`, `atol`: the iteration has converged when every entry of the last update is at most `atol + rtol * scale`,
        `scale` being the largest magnitude that this component has had up to this time. One more update is contained in
        the answer: of Newton's method, so that its error is about the square of this. With an approximate Jacobian
        convergence is linear, and the sum of all updates to come must be as small, at the rate measured from the last
        two; and so must what the defects add up to. Below four times the machine epsilon `rtol` has no effect.
    - `norm`: a norm of one step's scaled update; the largest over all steps must be at most 1.
    - `jacobian`: what takes the place of `A`. The default, `Dense()`, is Newton's method; `Diagonal()`, `Hutchinson(...)`
        and `BlockDiagonal(...)` are quasi-Newton methods; `Identity()` is Picard and `Zero()` Jacobi iteration;
        `Scaled(...)` and `Clipped(...)` tame another.
    - `scan`: how the linear recurrence is evaluated: by default an associative scan, on a CPU a sequential one. With
        `ShardedScan(mesh)` all that is done with the steps is spread over several devices.

    Where rounding keeps the update above the tolerance, as it can in float32 over long times, the iteration has converged
    once the update stops falling, while it is below half the digits and every step's own equation holds to rounding: no
    sequential solve could do better. An iterate is finite at all times: a state whose update is not finite or absurdly
    large, or out of which a step cannot be taken, is replaced by the last good state before the first such, as a new guess.

    **Results:** `successful` under one of the two conditions above; `nonlinear_divergence` when neither the update falls
    nor the converged part grows (with an approximate Jacobian: when the step after the converged part cannot be
    evaluated); `nonlinear_max_steps_reached`. A NaN is never a success.

    **Statistics:** `num_converged`, the number of leading steps that have converged; `update`, the largest scaled
    entry of the last update; `rounding_size`, with exact Jacobians, what the rounding errors of each entry are relative to.

    Cost per iteration with `Dense()`: `D` Jacobian-vector products of a step and `D^3` multiplications a step; memory
    `N D^2`; depth `2 log2 N`. With diagonal approximations `D` multiplications a step and memory of about ten `N D`.

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
