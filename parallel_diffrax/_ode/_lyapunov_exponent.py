"""Lyapunov exponents of an ordinary differential equation under a solver."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._recurrence import (
    AbstractPolicy,
    AdaptivePolicy,
    check_estimate,
    check_kinds,
    estimate,
    LyapunovEstimate,
    ParallelNewton,
    Ravel,
    solve_recurrence,
    stop_gradient,
)
from .._scan import AbstractScan, AutoScan, check_integer
from ._predictor import AbstractPredictor, CoarsePredictor, WindowGuess
from ._solver import ParallelSolver
from ._step_map import make_step_map
from ._window import uniform_times, Window


@eqx.filter_jit
def lyapunov_exponent(
    terms: PyTree[dfx.AbstractTerm],
    solver: dfx.AbstractSolver,
    t0: Float[ArrayLike, ""],
    t1: Float[ArrayLike, ""],
    y0: PyTree[Array],
    args: PyTree = None,
    *,
    num_steps: int,
    transient: float = 0.1,
    num_exponents: int = 0,
    scan: AbstractScan = AutoScan(),
    root_finder: optx.AbstractRootFinder = ParallelNewton(),
    max_steps: int = 32,
    predictor: AbstractPredictor = CoarsePredictor(),
    policy: AbstractPolicy = AdaptivePolicy(),
    throw: bool = True,
) -> LyapunovEstimate:
    """The largest Lyapunov exponent of an ODE, as a solver steps it, and on request the others.

    Along the trajectory of `num_steps` equal steps with Jacobians `A[i]`, a perturbation of the initial state grows to
    `A[k] ... A[0] v`. The largest exponent is the mean slope of

        growth[k] = log(|A[k] ... A[0]|_F / sqrt(D))

    over time, after a transient in which the trajectory approaches its attractor and perturbations turn into the direction
    that grows fastest. The products are evaluated by an associative scan of matrices in units of powers of two, which can
    neither overflow nor underflow at any length, and in which scaling makes no rounding error.

    How long is long enough depends on the system: the estimate of a limit cycle or a fixed point is off by `O(1 / T)`, that
    of a chaotic one by about `sqrt(c / T)`, where `c` is the variance of the exponent over time `T`, times `T`.

    ```python
    pdx.lyapunov_exponent(term, diffrax.Tsit5(), 0.0, 1000.0, y0, num_steps=100_000).exponent
    ```

    **Arguments:**

    - `terms`, `solver`, `t0`, `t1`, `y0`, `args`: as of `diffrax.diffeqsolve`, for equations without noise; the solver
        is a one-step solver of Diffrax, not wrapped in `ParallelSolver`.
    - `num_steps`: the number of steps, `N`.
    - `transient`: the share of the time span, from its beginning, that does not count; at least 0, less than 1.
    - `num_exponents`: how many exponents of the spectrum to compute, at most the size `D` of the state; with 0, none.
    - `scan`: how products are evaluated: `SequentialScan()` makes the same estimate step by step.
    - `root_finder`, `max_steps`, `predictor`, `fallback`: how the trajectory is found, as of `ParallelSolver`, whose
        `root_find_max_steps` is `max_steps`. `AdaptivePolicy(max_exponent=-math.inf)` makes its steps in sequence.
    - `throw`: whether to raise if the trajectory could not be found. If `False`, the estimate is then NaN.

    **Returns:** a `LyapunovEstimate`. Exponents are per unit of time, of `|t|` where time runs backwards. There is no
    derivative.

    **Raises:** `ValueError` for numbers out of range, or for a solver whose step is not a map of the state alone; a
    runtime error if the trajectory is not finite, or takes no time.

    Cost beyond the trajectory: `D` Jacobian-vector products a step, and `N D^3` multiplications in `log2 N` depth, in parts
    of at most 16384 steps; memory `N D` and the Jacobians of one part. The spectrum takes `N / 16` QR factorisations in
    sequence, or `N` where the exponents are so different that 16 steps cannot be multiplied.

    ??? cite "Reference"

        Benettin, Galgani, Giorgilli, Strelcyn, "Lyapunov characteristic exponents for smooth dynamical systems", Meccanica
        15 (1980).
    """
    y0 = jtu.tree_map(jnp.asarray, y0)
    check_kinds("lyapunov_exponent", root_finder, policy, max_steps)
    if isinstance(solver, ParallelSolver):
        raise ValueError(
            "`lyapunov_exponent(solver=ParallelSolver(...))`: the steps are solved in parallel as they are. Give the base "
            "solver, and `root_finder`, `predictor` and `fallback` by name."
        )
    check_integer("lyapunov_exponent", "num_steps", num_steps, "the number of steps")
    ravel = Ravel(y0)
    check_estimate("lyapunov_exponent", num_steps, ravel.size, transient, num_exponents)
    time_dtype = jnp.result_type(t0, t1)
    if not jnp.issubdtype(time_dtype, jnp.floating):
        time_dtype = jnp.result_type(float)
    t0, t1 = jnp.asarray(t0, time_dtype), jnp.asarray(t1, time_dtype)
    if throw:
        t1 = eqx.error_if(t1, t0 == t1, "`lyapunov_exponent(t0=..., t1=...)`: nothing grows over no time: `t0 == t1`.")

    terms, args, y0 = stop_gradient((terms, args, y0))
    step_map = make_step_map(solver, terms, y0, args, root_finder, jnp.result_type(t0))
    _check_solver_state_is_none(step_map, solver)
    if not step_map.smooth:
        raise ValueError(
            f"`lyapunov_exponent({terms!r}, ...)`: expected an `ODETerm` or a `MultiTerm` of these; noise is not supported. "
            "Use `scan_lyapunov_exponent` on the steps of one realisation."
        )
    window = Window(step_map, solver.interpolation_cls, uniform_times(t0, t1, num_steps), y0, num_steps)
    recurrence = stop_gradient(window.recurrence())
    solution = solve_recurrence(
        recurrence,
        WindowGuess(predictor, window),
        root_finder=root_finder,
        max_steps=max_steps,
        policy=policy,
        eps=ravel.eps,
        step_size=(t1 - t0) / num_steps,
    )
    ts = window.ts[1:]
    return estimate(recurrence, solution, ravel.unravel, t0, ts, transient, num_exponents, scan, throw)


def _check_solver_state_is_none(step_map, solver):
    if step_map.has_solver_state:
        raise ValueError(
            f"`lyapunov_exponent(solver={type(solver).__name__}(), ...)`: a step of this solver depends on more than the "
            "state at its start (it is a multi-step or stateful method). Use a one-step method, for example "
            "`diffrax.Heun()` or `diffrax.Tsit5()`."
        )
