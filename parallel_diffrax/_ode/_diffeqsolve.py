"""`diffeqsolve`, Diffrax's function with its solver made parallel: one import changes."""

import math
from dataclasses import replace
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._recurrence import ParallelNewton, Ravel
from ._adjoint import CountingAdjoint, ParallelAdjoint
from ._compat import is_unset_tolerance
from ._predictor import AdaptivePredictor, CoarsePredictor
from ._refine import refine
from ._solver import ParallelSolver
from ._step_map import make_step_map
from ._window_controller import Windows
from ._window_pid import WindowPID


# The most numbers in the Jacobians of a window. A solve with its gradient takes about twelve times their memory: 25 MB.
_MAX_JACOBIANS = 2**18
# The most steps in a window: on a grid of known length; on one of traced length, where unused steps are computed too; and on
# an adaptive one, where a rejected window wastes all of its steps.
_KNOWN, _TRACED, _ADAPTIVE = 2**16, 2**10, 2**6
# Smaller windows are not worth a root find. An adaptive solve can make this many windows for each interval between jumps.
_MIN_STEPS, _MIN_WINDOWS = 8, 16

_ADJOINTS = (dfx.RecursiveCheckpointAdjoint, dfx.DirectAdjoint, dfx.ForwardMode, ParallelAdjoint)
_FIXED = (dfx.ConstantStepSize, dfx.StepTo)


def diffeqsolve(
    terms,
    solver: dfx.AbstractSolver,
    t0,
    t1,
    dt0,
    y0,
    args=None,
    *,
    saveat: dfx.SaveAt = dfx.SaveAt(t1=True),
    stepsize_controller: dfx.AbstractStepSizeController = dfx.ConstantStepSize(),
    adjoint: dfx.AbstractAdjoint = dfx.RecursiveCheckpointAdjoint(),
    event: dfx.Event | None = None,
    max_steps: int | None = 4096,
    throw: bool = True,
    progress_meter: dfx.AbstractProgressMeter = dfx.NoProgressMeter(),
    solver_state=None,
    controller_state=None,
    made_jump=None,
    discrete_terminating_event=None,
) -> dfx.Solution:
    """`diffrax.diffeqsolve`, solved in parallel over time: the same arguments, with the same meaning, and the same result.

    Use it to make a program parallel by changing one import. Use `ParallelSolver` to choose windows, predictors and root
    finders; given as `solver`, it keeps those that it has.

    ```python
    from parallel_diffrax import diffeqsolve

    sol = diffeqsolve(term, diffrax.Tsit5(), t0, t1, dt0, y0, saveat=diffrax.SaveAt(ts=ts))
    ```

    - *Steps.* With `ConstantStepSize` and `StepTo`, they are those of Diffrax. With `PIDController`, also inside
        `ClipStepSizeController`, they are others, to the same tolerance: windows of up to 64 steps are accepted by the sum
        of the errors of their steps.
    - *Events* are checked at the end of every step. *Outputs* and dense output are those of the steps. *Derivatives* are
        computed by `ParallelAdjoint`.
    - `max_steps` bounds the number of steps. `sol.stats` counts steps: `num_steps`, `num_accepted_steps` and
        `num_rejected_steps`. `statistics(sol)` tells how they were made.
    - A solve with states that are not finite fails. Diffrax calls it successful.

    Diffrax itself solves these, in sequence: `SaveAt(steps=...)`; solver and controller states that are saved or passed on;
    progress meters; other step-size controllers; `store_rejected_steps`; other adjoints than its three for discretise-then-
    optimise, and `checkpoints`; `UnsafeBrownianPath`; solver states that are not made of floating-point numbers; vector fields
    without a forward-mode derivative; states so large, or a `max_steps` so small, that a window would have fewer than 8
    steps; constant steps of which there are more than `max_steps`. `statistics(sol)` then raises `ValueError`.

    **Arguments, returns, raises:** as `diffrax.diffeqsolve`.

    **Cost:** as `ParallelSolver`. The number of steps in a window is chosen by the number of steps, if `t0`, `t1` and `dt0`
    are not traced, and by the memory for Jacobians.
    """
    call = dict(locals())
    # A solver that wraps another one claims to be an instance of it.
    given = solver if isinstance(solver, ParallelSolver) and issubclass(type(solver), ParallelSolver) else None
    if given is not None and (type(stepsize_controller) is Windows or given.ts is not None):
        # The windows are the user's.
        return dfx.diffeqsolve(**call)
    call["solver"] = base = solver if given is None else given.solver
    changes = _windows(given, call) if _is_supported(given, **call) else None
    if changes is not None:
        sol = _solve({**call, **changes, "adjoint": CountingAdjoint()})
        return replace(sol, stats=sol.stats | {"max_steps": max_steps})
    if type(adjoint) is ParallelAdjoint and not isinstance(base, ParallelSolver):
        call["adjoint"] = dfx.RecursiveCheckpointAdjoint()
    return dfx.diffeqsolve(**call)


@eqx.filter_jit
def _solve(call: dict[str, Any]) -> dfx.Solution:
    sol = dfx.diffeqsolve(**call)
    return refine(sol) if call["saveat"].dense else sol


def _is_supported(
    given: ParallelSolver | None, *, terms, solver, dt0, saveat, stepsize_controller, adjoint, solver_state, **others
) -> bool:
    """Whether every argument has a meaning for windows. Those that are errors are left to Diffrax too."""
    states = [others[name] for name in ("controller_state", "made_jump", "discrete_terminating_event")]
    root_finder = getattr(solver, "root_finder", None)
    unset = any(is_unset_tolerance(getattr(root_finder, name, None)) for name in ("rtol", "atol", "norm"))
    leaves = jtu.tree_leaves(terms, is_leaf=lambda x: isinstance(x, dfx.UnsafeBrownianPath))
    return (
        not isinstance(solver, ParallelSolver)
        and (_is_adaptive(stepsize_controller) or type(stepsize_controller) in _FIXED)
        and (_is_adaptive(stepsize_controller) or (dt0 is None) == (type(stepsize_controller) is dfx.StepTo))
        and (_is_adaptive(stepsize_controller) or given is not None or not unset)
        and type(adjoint) in _ADJOINTS
        and getattr(adjoint, "checkpoints", None) is None
        and type(others["progress_meter"]) is dfx.NoProgressMeter
        and all(state is None for state in states)
        and (given is not None or (solver_state is None and not saveat.solver_state))
        and not (saveat.controller_state or saveat.made_jump or any(sub.steps != 0 for sub in _subs(saveat)))
        and not any(isinstance(leaf, dfx.UnsafeBrownianPath) for leaf in leaves)
    )


def _is_adaptive(controller) -> bool:
    if type(controller) is dfx.ClipStepSizeController:
        return controller.store_rejected_steps is None and _is_adaptive(controller.controller)
    return type(controller) is dfx.PIDController


def _subs(saveat: dfx.SaveAt) -> list[dfx.SubSaveAt]:
    return jtu.tree_leaves(saveat.subs, is_leaf=lambda x: isinstance(x, dfx.SubSaveAt))


def _windows(given: ParallelSolver | None, call: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments for a solve in windows; `None` if Diffrax should make the steps."""
    controller, max_steps, saveat = (call[name] for name in ("stepsize_controller", "max_steps", "saveat"))
    adaptive = _is_adaptive(controller)
    # The dtype of times, as Diffrax chooses it.
    times = [call["t0"], call["t1"], call["dt0"], *(sub.ts for sub in _subs(saveat))]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(t for t in times if t is not None))
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    root_finder = dfx.with_stepsize_controller_tols(ParallelNewton)() if adaptive else ParallelNewton()
    try:
        size, loose = _trace_step(call, dtype, root_finder)
    except Exception:
        # An error of the user's, which Diffrax raises, or something that only parallel steps need, such as a JVP.
        return None
    count = None if adaptive else _num_steps(call, dtype)
    if count == 0 or (count is not None and max_steps is not None and count > max_steps):
        return None
    num_steps = _capacity(controller, adaptive, count, max_steps, size) if given is None else given.num_steps
    if num_steps == 0:
        return None
    predictor = _loose_predictor(controller) if adaptive and loose else CoarsePredictor()
    solver = ParallelSolver(call["solver"], num_steps, root_finder, predictor=predictor) if given is None else given
    if adaptive:
        bound = None if max_steps is None else max(max_steps // num_steps, 1)
        return dict(solver=solver, stepsize_controller=WindowPID.of(controller, num_steps), max_steps=bound)
    solver = replace(solver, ts=controller.ts) if type(controller) is dfx.StepTo else solver
    bound = None if max_steps is None else math.ceil((count or max_steps) / num_steps)
    return dict(solver=solver, stepsize_controller=Windows(), max_steps=bound)


def _trace_step(call: dict[str, Any], dtype, root_finder) -> tuple[int, bool]:
    """Traces a step and its derivative, without running them. Returns the size of the state, and whether a loose adaptive
    solve is possible. Raises whatever tracing raises."""
    loose = False

    def step(terms, t, y0, args):
        nonlocal loose
        with jax.numpy_dtype_promotion("standard"):
            y0 = jtu.tree_map(lambda y: jnp.asarray(y, jnp.result_type(y, dtype)), y0)
        step_map = make_step_map(call["solver"], terms, y0, args, root_finder, dtype)
        loose = step_map.embedded_solver is not None and step_map.smooth
        step_map, state = step_map.begin(t, y0, step_map.initial_solver_state(t, t, y0), False)
        ravel = Ravel(state)
        y = ravel.ravel(state)
        return jax.jvp(lambda y: ravel.ravel(step_map(t, t, ravel.unravel(y)).y1), (y,), (y,))

    t = jax.ShapeDtypeStruct((), dtype)
    y, _ = eqx.filter_eval_shape(step, call["terms"], t, call["y0"], call["args"])
    return y.size, loose


def _num_steps(call: dict[str, Any], dtype) -> int | None:
    """The number of steps of a fixed grid; `None` if it is traced or infinite."""
    if type(call["stepsize_controller"]) is dfx.StepTo:
        return len(call["stepsize_controller"].ts) - 1
    try:
        t0, t1, dt0 = (np.asarray(call[name], dtype) for name in ("t0", "t1", "dt0"))
    except jax.errors.TracerArrayConversionError:
        return None
    count = np.ceil(abs(t1 - t0) / np.nextafter(abs(dt0), np.asarray(np.inf, dtype)))
    return int(count) if np.isfinite(count) else None


def _capacity(controller, adaptive: bool, count: int | None, max_steps: int | None, size: int) -> int:
    """The number of steps in a window; 0 if it is too small to be worth it."""
    capacity = _MAX_JACOBIANS // max(size, 1) ** 2
    if count is not None:
        return min(capacity, _KNOWN, count) if capacity >= min(count, _MIN_STEPS) else 0
    capacity = min(capacity, _ADAPTIVE if adaptive else _TRACED)
    if adaptive:
        ends = [controller.step_ts, controller.jump_ts] if type(controller) is dfx.ClipStepSizeController else []
        intervals = 1 + sum(len(ts) for ts in ends if ts is not None)
        capacity = capacity if max_steps is None else min(capacity, max_steps // (_MIN_WINDOWS * intervals))
    elif max_steps is not None:
        # The last window that `max_steps` allows ends at the last step that it allows.
        capacity = max((k for k in range(1, capacity + 1) if max_steps % k == 0), default=0)
    return capacity if capacity >= _MIN_STEPS else 0


def _loose_predictor(controller) -> AdaptivePredictor | CoarsePredictor:
    """A loose solve to the square root of the relative tolerance makes the first guess and the grid."""
    rtol, atol = controller.rtol, controller.atol
    if not all(isinstance(tol, int | float) for tol in (rtol, atol)) or not 0 < rtol < 1:
        return CoarsePredictor()
    return AdaptivePredictor(rtol=rtol**0.5, atol=atol / rtol**0.5)
