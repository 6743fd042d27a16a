"""`diffeqsolve`, Diffrax's function with its solver made parallel: one import changes."""

import dataclasses
import functools as ft
import math
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._recurrence import ParallelNewton, Ravel
from ._adjoint import ParallelAdjoint
from ._compat import is_unset_tolerance
from ._predictor import AdaptivePredictor, CoarsePredictor
from ._refine import refine
from ._solver import ParallelSolver
from ._step_map import make_step_map
from ._window_controller import Windows


# Numbers in the Jacobians of a window. A solve with its gradient takes about twelve times that memory, 25 MB in float64.
_MAX_JACOBIANS = 2**18
# The largest windows: of a grid whose length is known, of one whose length is traced, and of an adaptive grid, where a
# rejected window wastes all of its steps.
_KNOWN, _TRACED, _ADAPTIVE = 2**16, 2**10, 2**6
# Smaller windows are not worth a root find. In an adaptive solve, `max_steps` allows so many windows for each interval.
_MIN_STEPS, _MIN_WINDOWS = 8, 16

_ADJOINTS = (dfx.RecursiveCheckpointAdjoint, dfx.DirectAdjoint, dfx.ForwardMode, ParallelAdjoint)


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

    The following are solved by `diffrax.diffeqsolve` itself, in sequence: `SaveAt(steps=...)`; solver and controller states
    that are saved or passed on; progress meters; other step-size controllers; `store_rejected_steps`; `BacksolveAdjoint`,
    `ImplicitAdjoint` and `RecursiveCheckpointAdjoint(checkpoints=...)`; `UnsafeBrownianPath`; solvers whose state is not made
    of floating-point numbers; vector fields without a forward-mode derivative; states so large that a window would have
    fewer than 8 steps; more constant steps than `max_steps`. `statistics(sol)` then raises `ValueError`.

    **Arguments, returns, raises:** as `diffrax.diffeqsolve`.

    **Cost:** as `ParallelSolver`. The number of steps in a window is chosen by the number of steps, if `t0`, `t1` and `dt0`
    are not traced, and by the memory for Jacobians.
    """
    call = dict(saveat=saveat, adjoint=adjoint, event=event, max_steps=max_steps, throw=throw)
    call |= dict(progress_meter=progress_meter, solver_state=solver_state, controller_state=controller_state)
    call |= dict(made_jump=made_jump, discrete_terminating_event=discrete_terminating_event)
    call |= dict(stepsize_controller=stepsize_controller)
    problem = terms, t0, t1, dt0, y0, args
    given = solver if issubclass(type(solver), ParallelSolver) else None
    base = solver if given is None else given.solver
    if given is not None and (type(stepsize_controller) is Windows or given.ts is not None):
        # The windows are the user's.
        return dfx.diffeqsolve(terms, solver, t0, t1, dt0, y0, args, **call)
    if not _is_supported(base, given, problem, call):
        return dfx.diffeqsolve(terms, base, t0, t1, dt0, y0, args, **call)
    changes = _windows(base, given, problem, call)
    if changes is None:
        return dfx.diffeqsolve(terms, base, t0, t1, dt0, y0, args, **call)
    call.update(changes, adjoint=_StepCounts())
    sol = _solve(*problem, call)
    return eqx.tree_at(lambda sol: sol.stats["max_steps"], sol, max_steps, is_leaf=lambda x: x is None)


@eqx.filter_jit
def _solve(terms, t0, t1, dt0, y0, args, call: dict[str, Any]) -> dfx.Solution:
    call = dict(call)
    sol = dfx.diffeqsolve(terms, call.pop("solver"), t0, t1, call.pop("dt0", dt0), y0, args, **call)
    return refine(sol) if call["saveat"].dense else sol


def _is_supported(base: dfx.AbstractSolver, given: ParallelSolver | None, problem, call: dict[str, Any]) -> bool:
    """Whether Diffrax's arguments have a meaning for windows. The first few would be an error, which Diffrax reports."""
    terms, t0, t1, dt0, y0, args = problem
    controller, saveat, adjoint = (call[name] for name in ("stepsize_controller", "saveat", "adjoint"))
    subs = jtu.tree_leaves(saveat.subs, is_leaf=_is_sub_saveat)
    states = [call[name] for name in ("controller_state", "made_jump", "discrete_terminating_event")]
    if given is None:
        states += [call["solver_state"], saveat.solver_state or None]
        unset = isinstance(base, dfx.AbstractImplicitSolver) and any(
            is_unset_tolerance(getattr(base.root_finder, name)) for name in ("rtol", "atol", "norm")
        )
        if unset and not _is_adaptive(controller):
            return False
    if (dt0 is None) != (type(controller) is dfx.StepTo) and not _is_adaptive(controller):
        return False
    if isinstance(base, ParallelSolver) or any(state is not None for state in states):
        return False
    if saveat.controller_state or saveat.made_jump or any(sub.steps != 0 for sub in subs):
        return False
    if type(controller) not in (dfx.ConstantStepSize, dfx.StepTo) and not _is_adaptive(controller):
        return False
    if type(adjoint) not in _ADJOINTS or getattr(adjoint, "checkpoints", None) is not None:
        return False
    unsafe = lambda x: isinstance(x, dfx.UnsafeBrownianPath)
    return type(call["progress_meter"]) is dfx.NoProgressMeter and not any(
        map(unsafe, jtu.tree_leaves(terms, is_leaf=unsafe))
    )


def _is_sub_saveat(x) -> bool:
    return isinstance(x, dfx.SubSaveAt)


def _is_adaptive(controller) -> bool:
    if type(controller) is dfx.ClipStepSizeController:
        return controller.store_rejected_steps is None and _is_adaptive(controller.controller)
    return type(controller) is dfx.PIDController


def _windows(base, given: ParallelSolver | None, problem, call: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments with which Diffrax solves in windows; `None` if it should make the steps itself."""
    terms, t0, t1, dt0, y0, args = problem
    controller, max_steps = call["stepsize_controller"], call["max_steps"]
    subs = jtu.tree_leaves(call["saveat"].subs, is_leaf=_is_sub_saveat)
    times = [x for x in (t0, t1, dt0, *(sub.ts for sub in subs)) if x is not None]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*times)
        dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    adaptive = _is_adaptive(controller)
    root_finder = dfx.with_stepsize_controller_tols(ParallelNewton)() if adaptive else ParallelNewton()
    try:
        size, loose = _trace_step(base, terms, y0, args, dtype, root_finder)
    except Exception:
        # Of the user's function, or of the kind of solver. Diffrax raises it, or can do without what is missing.
        return None
    capacity = _MAX_JACOBIANS // max(size, 1) ** 2
    if adaptive:
        clips = [controller.step_ts, controller.jump_ts] if type(controller) is dfx.ClipStepSizeController else []
        intervals = 1 + sum(len(ts) for ts in clips if ts is not None)
        capacity = min(capacity, _ADAPTIVE, _ADAPTIVE if max_steps is None else max_steps // (_MIN_WINDOWS * intervals))
        capacity = 2 ** int(math.log2(max(capacity, 1)))
        small = capacity < _MIN_STEPS
    else:
        count = len(controller.ts) - 1 if type(controller) is dfx.StepTo else _constant_steps(t0, t1, dt0, dtype)
        if count == 0 or (None not in (count, max_steps) and count > max_steps):
            return None
        if count is not None:
            small = capacity < min(count, _MIN_STEPS)
            capacity = min(capacity, _KNOWN, count)
        else:
            # The last window that is allowed ends at the last step that is.
            capacity = min(capacity, _TRACED)
            if max_steps is not None:
                capacity = max(k for k in range(1, max(capacity, 1) + 1) if max_steps % k == 0)
            small = capacity < min(_MIN_STEPS, capacity if max_steps is None else max_steps)
    if given is None and small:
        return None
    num_steps = capacity if given is None else given.num_steps
    solver = given
    if given is None:
        predictor = CoarsePredictor()
        if adaptive and loose:
            predictor = _loose_predictor(controller)
        solver = ParallelSolver(base, num_steps, root_finder, predictor=predictor)
    changes: dict[str, Any] = {"solver": solver}
    if adaptive:
        changes["stepsize_controller"] = _scaled(controller, num_steps)
        changes["max_steps"] = None if max_steps is None else max(max_steps // num_steps, 1)
        return changes
    if type(controller) is dfx.StepTo:
        changes["solver"] = dataclasses.replace(solver, ts=controller.ts)
    bound = max_steps if count is None else count
    changes["stepsize_controller"] = Windows()
    changes["max_steps"] = None if max_steps is None else math.ceil(bound / num_steps)
    return changes


def _trace_step(base, terms, y0, args, dtype, root_finder) -> tuple[int, bool]:
    """Traces a step and its derivative, without running them. Returns the size of the state, and whether a loose adaptive
    solve of the equation is possible. Raises whatever tracing raises."""
    loose = False

    def step(terms, t, y0, args):
        nonlocal loose
        y0 = jtu.tree_map(lambda y: jnp.asarray(y, jnp.result_type(y, dtype)), y0)
        step_map = make_step_map(base, terms, y0, args, root_finder, dtype)
        loose = step_map.embedded_solver is not None and step_map.smooth
        step_map, state = step_map.begin(t, y0, step_map.initial_solver_state(t, t, y0), False)
        ravel = Ravel(state)
        function = lambda state: ravel.ravel(step_map(t, t, ravel.unravel(state)).y1)
        state = ravel.ravel(state)
        return jax.jvp(function, (state,), (state,))

    with jax.numpy_dtype_promotion("standard"):
        traced, _ = eqx.filter_eval_shape(step, terms, jax.ShapeDtypeStruct((), dtype), y0, args)
    return traced.size, loose


def _constant_steps(t0, t1, dt0, dtype) -> int | None:
    """The number of steps of `diffrax.ConstantStepSize`; `None` if it is traced or infinite."""
    try:
        start, end, step = (np.asarray(x, dtype) for x in (t0, t1, dt0))
    except jax.errors.TracerArrayConversionError:
        return None
    step = abs(step)
    count = np.ceil(abs(end - start) / np.nextafter(step, np.asarray(np.inf, dtype)))
    return int(count) if np.isfinite(count) else None


def _loose_predictor(controller):
    """A loose solve takes about the square root of the tolerance."""
    rtol, atol = controller.rtol, controller.atol
    if not all(isinstance(tol, int | float) for tol in (rtol, atol)) or not 0 < rtol < 1:
        return CoarsePredictor()
    return AdaptivePredictor(rtol=float(rtol) ** 0.5, atol=float(atol) * float(rtol) ** -0.5)


def _scaled(controller, num_steps: int):
    if type(controller) is dfx.ClipStepSizeController:
        return eqx.tree_at(lambda c: c.controller, controller, _scaled(controller.controller, num_steps))
    return _WindowPID(controller, num_steps)


class _WindowPID(dfx.AbstractAdaptiveStepSizeController):
    """A `PIDController` for windows of `num_steps` steps. Its `dt0`, `dtmin` and `dtmax` are those of a step."""

    controller: dfx.PIDController
    num_steps: int = eqx.field(static=True)

    rtol = property(lambda self: self.controller.rtol)
    atol = property(lambda self: self.controller.atol)
    norm = property(lambda self: self.controller.norm)

    def wrap(self, direction):
        return _WindowPID(self.controller.wrap(direction), self.num_steps)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        end, state = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
        return t0 + (end - t0) * self.num_steps, state

    def adapt_step_size(self, *args):
        limits = {
            name: getattr(self.controller, name) * self.num_steps
            for name in ("dtmin", "dtmax")
            if getattr(self.controller, name) is not None
        }
        return dataclasses.replace(self.controller, **limits).adapt_step_size(*args)


class _StepCounts(ParallelAdjoint):
    """`ParallelAdjoint`, with Diffrax's statistics for steps, and those of windows beside them."""

    def loop(self, *, init_state, **kwargs):
        from ._loop_state import step_counts

        final, stats = super().loop(init_state=init_state, **kwargs)
        return final, stats | step_counts(init_state, final, kwargs["solver"].num_steps)
