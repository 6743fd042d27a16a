"""`diffeqsolve`, Diffrax's function with a `ParallelSolver`: one import changes."""

import math
from dataclasses import replace
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .._recurrence import ParallelNewton
from ._adjoint import CountingAdjoint, ParallelAdjoint
from ._compat import unset_tolerances
from ._controlled_window import SingleWindow
from ._refine import refine
from ._saving import requests
from ._solver import ParallelSolver
from ._step_map import trace_step
from ._window import time_dtype
from ._window_controller import Windows


# The most numbers in the Jacobians of a window. A solve with its gradient takes about twelve times their memory: 25 MB.
_MAX_JACOBIANS = 2**18
# The most steps in a window: on a grid of known length; on one of traced length, where unused steps take time and memory in
# every member of a batch. Smaller windows are not worth it.
_KNOWN, _TRACED, _MIN_STEPS = 2**16, 2**7, 8
# The most steps of an adaptive solve that is one window, whose derivative stores the time of each; the steps in each window
# of a longer solve, and of one with events.
_MOST_CONTROLLED, _CONTROLLED, _EVENT = 2**17, 2**9, 2**6

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
    """`diffrax.diffeqsolve` with a `ParallelSolver`: the same arguments, meanings and results.

    Use it to make a program faster by changing one import. To choose windows, policies, predictors and root finders, pass a
    `ParallelSolver`; it keeps them.

    ```python
    from parallel_diffrax import diffeqsolve

    sol = diffeqsolve(term, diffrax.Tsit5(), t0, t1, dt0, y0, saveat=diffrax.SaveAt(ts=ts))
    ```

    - *Steps* are Diffrax's. Those of `ConstantStepSize` and `StepTo` are made sequentially or in parallel, as `CostPolicy`
        decides. Those of a `PIDController`, by itself or inside `ClipStepSizeController`, are the same accepted and rejected
        steps, made sequentially in one loop, on a GPU in one kernel if the step is small. (If `max_steps` is `None` or above
        131072, windows of up to 512 steps, or 64 with events, end between Diffrax's steps.)
    - *Events* are checked on every step. *Progress meters* are updated once a window. *Derivatives* are those of
        `ParallelAdjoint`. A controller's choice of the lengths of steps is not differentiated.
    - `max_steps` bounds the number of steps. `num_steps`, `num_accepted_steps` and `num_rejected_steps` in `sol.stats`
        count steps. `statistics(sol)` says how they were made.
    - A solve that is not finite fails. In Diffrax it is successful. A step that becomes infinite under a `PIDController` is
        tried again with a shorter one. Diffrax repeats it until `max_steps` is reached.

    Diffrax itself solves the following, and `statistics(sol)` raises `ValueError`: `SaveAt(steps=...)`; solver and
    controller states that are saved or passed on; other step-size controllers; `store_rejected_steps`; adjoints other than
    `RecursiveCheckpointAdjoint()`, `DirectAdjoint` and `ForwardMode`; `UnsafeBrownianPath`; solver states that are not of
    floating-point numbers; solvers with a state under an adaptive controller with `jump_ts`; vector fields without
    forward-mode derivatives; constant steps of states so large, or with `max_steps` so small, that windows would have fewer
    than 8 steps; more constant steps than `max_steps`.

    **Arguments, returns, raises:** as `diffrax.diffeqsolve`.

    **Cost:** as `ParallelSolver`. With constant steps, if `t0`, `t1` and `dt0` are not traced, a window is as long as the
    solve, as far as the memory for Jacobians in parallel allows; otherwise it has up to 128 steps. With adaptive steps, the
    memory is that of the outputs and 256 states; for a derivative, also `max_steps` times. Dense output, and the outputs of
    `Kvaerno3`, `Kvaerno4` and `Kvaerno5`, take that of `max_steps` states.
    """
    call = dict(locals())
    # A solver that wraps another one claims to be an instance of it.
    given = solver if isinstance(solver, ParallelSolver) and issubclass(type(solver), ParallelSolver) else None
    if given is not None and (type(stepsize_controller) is Windows or given.ts is not None):  # windows are the user's
        return dfx.diffeqsolve(**call)
    call["solver"] = base = solver if given is None else given.solver
    changes = _windows(given, call) if _is_supported(given, **call) else None
    if changes is not None:
        sol = _solve({**call, **changes, "adjoint": CountingAdjoint(max_steps)})
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
    unset, kind = unset_tolerances(getattr(solver, "root_finder", None)), type(stepsize_controller)
    fixed = kind in _FIXED and (dt0 is None) == (kind is dfx.StepTo) and (given is not None or not unset)
    leaves = jtu.tree_leaves(terms, is_leaf=lambda x: isinstance(x, dfx.UnsafeBrownianPath))
    return (
        not isinstance(solver, ParallelSolver)
        and (fixed or _is_adaptive(stepsize_controller))
        and type(adjoint) in _ADJOINTS
        and getattr(adjoint, "checkpoints", None) is None
        and all(state is None for state in states)
        and (given is not None or (solver_state is None and not saveat.solver_state))
        and not (saveat.controller_state or saveat.made_jump or any(sub.steps != 0 for sub in requests(saveat)))
        and not any(isinstance(leaf, dfx.UnsafeBrownianPath) for leaf in leaves)
    )


def _is_adaptive(controller) -> bool:
    if isinstance(controller, dfx.ClipStepSizeController):
        return controller.store_rejected_steps is None and _is_adaptive(controller.controller)
    return type(controller) is dfx.PIDController


def _windows(given: ParallelSolver | None, call: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments for a solve in windows; `None` if Diffrax should make the steps."""
    controller, max_steps, saveat = (call[name] for name in ("stepsize_controller", "max_steps", "saveat"))
    times = [call["t0"], call["t1"], call["dt0"], *(sub.ts for sub in requests(saveat))]
    with jax.numpy_dtype_promotion("standard"):
        dtype = time_dtype(*(t for t in times if t is not None))
    try:
        size = trace_step(call["solver"], call["terms"], call["y0"], call["args"], ParallelNewton(), dtype)
    except Exception:
        # An error of the user's, which Diffrax raises, or something that only parallel steps need, such as a JVP.
        return None
    if _is_adaptive(controller):
        # A solver with a state of its own starts afresh where the field jumps, which its derivative would not know.
        jumps = getattr(controller, "jump_ts", None) is not None
        return None if jumps and given is None and size != _size(call["y0"]) else _adaptive_windows(given, call)
    count = _num_steps(call, dtype)
    num_steps = _capacity(count, max_steps, size) if given is None or given.num_steps is None else given.num_steps
    if num_steps == 0 or (None not in (count, max_steps) and not 0 < count <= max_steps):  # pyright: ignore
        return None
    solver = ParallelSolver(call["solver"]) if given is None else given
    solver = replace(solver, num_steps=num_steps, ts=controller.ts if type(controller) is dfx.StepTo else solver.ts)
    bound = None if max_steps is None else math.ceil((count or max_steps) / num_steps)
    return dict(solver=solver, stepsize_controller=Windows(), max_steps=bound)


def _adaptive_windows(given: ParallelSolver | None, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments for a solve whose steps the user's controller chooses: one window, unless it may have too many steps."""
    controller, max_steps = call["stepsize_controller"], call["max_steps"]
    solver = ParallelSolver(call["solver"]) if given is None else given
    single = max_steps is not None and max_steps <= _MOST_CONTROLLED
    if not single or solver.num_steps is not None or not solver.policy.follows_controller:
        num_steps = (
            (_EVENT if call["event"] is not None else _CONTROLLED) if solver.num_steps is None else solver.num_steps
        )
        return dict(solver=replace(solver, num_steps=num_steps))
    solver = replace(solver, num_steps=max_steps)
    return dict(solver=solver, stepsize_controller=SingleWindow(controller, call["dt0"]), max_steps=1)


def _size(y0) -> int:
    """The number of real numbers in a state."""
    return sum(np.size(y) * (2 if np.iscomplexobj(y) else 1) for y in jtu.tree_leaves(y0))


def _num_steps(call: dict[str, Any], dtype) -> int | None:
    """The number of steps of a fixed grid; `None` if it is traced or infinite."""
    if type(call["stepsize_controller"]) is dfx.StepTo:
        return len(call["stepsize_controller"].ts) - 1
    try:
        t0, t1, dt0 = (np.asarray(call[name], dtype) for name in ("t0", "t1", "dt0"))
    except jax.errors.TracerArrayConversionError:
        return None
    if dt0 == 0:
        return 0
    count = np.ceil(abs(t1 - t0) / np.nextafter(abs(dt0), np.asarray(np.inf, dtype)))
    return int(count) if np.isfinite(count) else None


def _capacity(count: int | None, max_steps: int | None, size: int) -> int:
    """The number of steps in a window; 0 if it would be too small to be worth it."""
    capacity = _MAX_JACOBIANS // max(size, 1) ** 2
    if count is not None:
        # A power of two, so that a program compiled for one number of steps serves for others.
        return min(capacity, _KNOWN, 2 ** max(count - 1, 0).bit_length()) if capacity >= min(count, _MIN_STEPS) else 0
    capacity = min(capacity, _TRACED)
    if max_steps is not None:
        # The last window that `max_steps` allows ends at the last step that it allows.
        capacity = max((k for k in range(1, capacity + 1) if max_steps % k == 0), default=0)
    return capacity if capacity >= _MIN_STEPS else 0
