"""Lyapunov exponents of an ordinary differential equation along a trajectory of a solver."""

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
from ._window import time_dtype, uniform_times, Window


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
    """Estimates the largest Lyapunov exponent of an ODE along a trajectory of a solver, and on request others.

    Along a trajectory of `num_steps` equal steps with Jacobians `A[i]`, a perturbation `v` of the initial state grows to
    `A[k] ... A[0] v`. The largest exponent is the mean slope over time of

        growth[k] = log(|A[k] ... A[0]|_F / sqrt(D))

    after a transient. In the transient the trajectory approaches its attractor, and perturbations turn into the direction
    that grows fastest. An associative scan evaluates the products as matrices scaled by powers of two. They neither
    overflow nor underflow at any length, and scaling makes no rounding errors.

    The necessary time span `T` depends on the system. The error is `O(1 / T)` for a limit cycle or a fixed point. For a
    chaotic system it is about `sqrt(c / T)`, where `c / T` is the variance of the exponent over time `T`.

    ```python
    pdx.lyapunov_exponent(term, diffrax.Tsit5(), 0.0, 1000.0, y0, num_steps=100_000).exponent
    ```

    **Arguments:**

    - `terms`, `solver`, `t0`, `t1`, `y0`, `args`: as in `diffrax.diffeqsolve`, for equations without noise. The solver is a
        one-step solver of Diffrax, not a `ParallelSolver`.
    - `num_steps`: `N`, the number of steps, at least 1.
    - `transient`: the length of the transient as a fraction of the time span, in `[0, 1)`.
    - `num_exponents`: the number of exponents of the spectrum, at most the size `D` of the state; with 0, no spectrum.
    - `scan`: evaluates the products. `SequentialScan()` makes the same estimate step by step.
    - `root_finder`, `max_steps`, `predictor`, `policy`: find the trajectory, as in `ParallelSolver`, where `max_steps` is
        called `root_find_max_steps`. `policies.Sequential()` makes its steps sequentially.
    - `throw`: whether to raise if the trajectory is not found. If `False`, the estimate is then NaN.

    **Returns:** a `LyapunovEstimate`. Exponents are per unit of time, or of `-t` if time runs backwards. There is no
    derivative.

    **Cost** beyond the trajectory: `D` Jacobian-vector products per step; `N D^3` multiplications in a depth of `log2 N`, in
    parts of at most 16384 steps; memory for `N D` numbers and the Jacobians of one part. The spectrum takes `N / 16`
    sequential QR factorisations, or `N` if the exponents differ too much for the product of 16 steps.

    **Raises:** `ValueError` for numbers out of range, for a `ParallelSolver`, for noise, and for a solver whose step depends
    on more than the state; `TypeError` for arguments of the wrong kind; if `throw`, a runtime error if the trajectory is not
    finite or `t0 == t1`.

    ??? cite "Reference"

        Benettin, Galgani, Giorgilli, Strelcyn, "Lyapunov characteristic exponents for smooth dynamical systems", Meccanica
        15 (1980).
    """
    y0 = jtu.tree_map(jnp.asarray, y0)
    check_kinds("lyapunov_exponent", root_finder, policy, max_steps)
    if isinstance(solver, ParallelSolver):
        raise ValueError(
            "`lyapunov_exponent(solver=ParallelSolver(...))`: the steps are solved in parallel already. Give the base "
            "solver, and `root_finder`, `predictor` and `policy` as arguments."
        )
    check_integer("lyapunov_exponent", "num_steps", num_steps, "the number of steps")
    ravel = Ravel(y0)
    check_estimate("lyapunov_exponent", num_steps, ravel.size, transient, num_exponents)
    dtype = time_dtype(t0, t1)
    t0, t1 = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
    if throw:
        t1 = eqx.error_if(t1, t0 == t1, "`lyapunov_exponent(t0=..., t1=...)`: nothing grows over no time: `t0 == t1`.")

    terms, args, y0 = stop_gradient((terms, args, y0))
    step_map = make_step_map(solver, terms, y0, args, root_finder, dtype)
    if step_map.has_solver_state:
        raise ValueError(
            f"`lyapunov_exponent(solver={type(solver).__name__}(), ...)`: a step of this solver depends on more than the "
            "state at its start (it is a multi-step or stateful method). Use a one-step method, for example "
            "`diffrax.Heun()` or `diffrax.Tsit5()`."
        )
    if not step_map.smooth:
        raise ValueError(
            f"`lyapunov_exponent({terms!r}, ...)`: expected an `ODETerm` or a `MultiTerm` of them; noise is not supported. "
            "Use `scan_lyapunov_exponent` on the steps of one realisation."
        )
    window = Window.make(step_map, solver.interpolation_cls, uniform_times(t0, t1, num_steps), y0, num_steps)
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
    return estimate(recurrence, solution, ravel.unravel, t0, window.ts[1:], transient, num_exponents, scan, throw)
