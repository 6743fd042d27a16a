"""`ParallelSolver`, the solver for `diffrax.diffeqsolve`."""

import copy
import dataclasses

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from .._kernels import on_cpu
from .._recurrence import (
    AbstractPolicy,
    CostPolicy,
    Counts,
    keep_in_checkpoint,
    num_leading_true,
    ParallelNewton,
    Ravel,
    RecurrenceSolution,
    scan_of,
    solve_recurrence,
    stop_gradient,
)
from .._scan import check_instance, check_integer, row_at
from ._compat import current_solve, Solve
from ._controlled_steps import WindowStart
from ._controlled_window import adaptive_part, initial_pace, make_controlled_window
from ._interpolation import AbstractFineStepSolver, FineSteps, may_end_elsewhere
from ._predictor import AbstractPredictor, CoarsePredictor
from ._statistics import Pace, SolverState
from ._step_map import make_step_map, StepOutput
from ._window import listed_times, time_dtype, uniform_times, UniformGrid, Window, window_error


# The number of steps for which a window has room if the user says nothing: steps of known length, steps that an adaptive
# controller chooses, and as many as are made in each window under such a controller.
_CONSTANT, _ADAPTIVE, _EQUAL = 512, 512, 64


def _as_times(ts: ArrayLike | None) -> Array | None:
    return None if ts is None else jnp.asarray(ts, time_dtype(jnp.asarray(ts)))


class ParallelSolver(AbstractFineStepSolver, dfx.AbstractImplicitSolver):
    """Makes many steps of a Diffrax solver at a time: all at once, in parallel over time, or in one fast sequential loop.

    Use it in place of the base solver. No other argument is needed:

    ```python
    sol = diffrax.diffeqsolve(term, pdx.ParallelSolver(diffrax.Tsit5()), t0, t1, dt0, y0, stepsize_controller=controller)
    ```

    `parallel_diffrax.diffeqsolve` chooses windows that suit the whole solve, and is faster where nothing else is said.

    Each Diffrax step is a *window* of fine steps of the base solver. The `policy` decides how they are made. In parallel,
    they are solved together as one system of equations,

        y[i] = Phi(t[i], t[i+1], y[i-1]),   i = 0 .. N - 1,

    whose solution is that of the base solver on the same fine grid. By default, steps are sequential on a CPU, and on a GPU
    wherever that is estimated to cost less: see `CostPolicy`.

    The step-size controller lays the windows:

    - `ConstantStepSize()`: without `num_steps`, each step is the user's step. With it, `dt0` is the length of a window of
        `num_steps` equal steps: `dt0=t1 - t0` makes the whole solve one window.
    - `StepTo(ts)`: each interval of `ts` is a step; with `num_steps` a window of equal steps.
    - `Windows()`: `dt0` is the fine step, as for Diffrax's own solvers. Windows have `num_steps` fine steps, 512 by default,
        the last one the remaining steps.
    - `PIDController(...)`, also in a `ClipStepSizeController`, under a policy that follows it (`CostPolicy`, `Sequential`):
        the controller accepts, rejects and chooses every fine step, with its own tolerances, as in Diffrax. A window has
        room for `num_steps` steps, 512 by default, accepted or rejected. The first window is as long as the controller's
        first step. Windows grow, tenfold at most (`PIDController.factormax`), until they are nearly full. One with too many
        steps is rejected and retried shorter. The end of a window cuts a step short.
    - The same under any other policy: windows of `num_steps` equal steps, 64 by default, adapt. One that is not solved is
        rejected and retried shorter. Any other is accepted or rejected by the sum of its steps' error estimates.

    `SaveAt(steps=True)`, events and progress meters see only the ends of windows. A float event that crosses zero an even
    number of times in one window is missed. Of several crossings, one is found. Make windows shorter than the time between
    crossings, or use `adjoint=ParallelAdjoint()` or `parallel_diffrax.diffeqsolve`, which check all fine steps.

    **Arguments:**

    - `solver`: the base solver: any Diffrax solver.
    - `num_steps`: `N`, the number of fine steps for which a window has room, at least 1. The list above has the
        defaults. Give it to solve thousands of steps in parallel.
    - `root_finder`: solves the steps of a window together. `diffrax.with_stepsize_controller_tols(ParallelNewton)()` takes
        its tolerances from an adaptive step-size controller. Sequential steps of an implicit base solver without
        tolerances take them from it; else they do not use it.
    - `root_find_max_steps`: the largest number of iterations of one attempt of the root finder, at least 1.
    - `predictor`: makes the first guess of steps in parallel.
    - `policy`: decides which steps run in parallel and which sequentially. By default the solution is right in any case:
        steps that cannot be solved in parallel are made sequentially.
    - `ts`: the ends of all fine steps of the solve, from its `t0` to its `t1`, shape `(M + 1,)`; by default the fine steps
        of a window have equal lengths. Use it with `stepsize_controller=pdx.Windows()` and `dt0=None`. Windows must begin
        and end at some of these times, with at most `num_steps` steps between. Differentiable.
    - `progress_meter`: shows the progress within each window, if its steps are not those of an adaptive controller. (The
        meter of `diffeqsolve` shows finished windows.)

    **Returns:** each step returns Diffrax's tuple. Its result is `successful` only if the equation of every fine step
    holds to tolerance or the step was made sequentially, and every state is finite. Otherwise it is `nonfinite`,
    `nonlinear_divergence`, `nonlinear_max_steps_reached`, or the failure that the base solver's step or the controller
    reported. A window of equal steps that failed has an infinite error estimate, so that an adaptive controller rejects it.
    So has a window that was not solved in parallel, if the policy does not split windows of `num_steps` steps.

    With `SaveAt(..., solver_state=True)`, `pdx.statistics(sol)` returns the `WindowStatistics` of the solve.

    **Cost** of a window, for a state of `D` real numbers:

    - *Sequential*: the steps, on a GPU in one kernel if a step is small, with one thread per member of a batch; memory
        `N D`. On a CPU the derivative takes one sweep of vector-Jacobian products over the steps, and no Jacobians.
        On a GPU it is that of steps in parallel. Under an adaptive controller only steps with outputs are kept, and the
        derivative makes the steps again from their times, 256 at a time, with one product each; it treats step lengths that
        the controller chose as constants.
    - *Parallel*: the predictor's sequential steps; per iteration, `N (D + 1)` evaluations of a step and one linear scan (of
        depth about `2 log2 N`; sequential on a CPU by default); one more evaluation of all steps. Memory `N D^2`. The
        derivative takes one reverse linear scan and no iterations.

    **Raises:** `TypeError` or `ValueError` if `num_steps` or `root_find_max_steps` is not a positive integer; `TypeError`
    for an argument of the wrong kind; `ValueError` for a `ParallelSolver` as the base solver, for a predictor that
    stores trajectories without `num_steps`, and for a base solver whose state is not made of floating-point numbers.

    ??? cite "References"

        Lim et al., "Parallelizing non-linear sequential models over the sequence length", arXiv 2309.12252 (2023).

        Gonzalez, "Parallel Newton methods", arXiv 2603.16850 (2026).
    """

    solver: dfx.AbstractSolver
    num_steps: int | None = eqx.field(static=True, default=None)
    root_finder: optx.AbstractRootFinder = ParallelNewton()
    root_find_max_steps: int = eqx.field(static=True, default=32)
    predictor: AbstractPredictor = CoarsePredictor()
    policy: AbstractPolicy = CostPolicy()
    ts: Float[Array, " M1"] | None = eqx.field(default=None, converter=_as_times)
    progress_meter: dfx.AbstractProgressMeter = dfx.NoProgressMeter()
    grid: UniformGrid | None = eqx.field(default=None, init=False)

    def __check_init__(self):
        if self.ts is not None and (self.ts.ndim != 1 or self.ts.shape[0] < 2):
            raise ValueError(
                f"`ParallelSolver(ts=...)`: expected the ends of the fine steps, a vector of at least two times, got shape "
                f"{self.ts.shape}."
            )
        integers = {"root_find_max_steps": "the largest number of iterations"}
        if self.num_steps is not None:
            integers["num_steps"] = "the number of fine steps in a window"
        for name, meaning in integers.items():
            check_integer("ParallelSolver", name, getattr(self, name), meaning)
        kinds = {
            "solver": (dfx.AbstractSolver, "diffrax.Tsit5()"),
            "root_finder": (optx.AbstractRootFinder, "ParallelNewton()"),
            "predictor": (AbstractPredictor, "CoarsePredictor()"),
            "policy": (AbstractPolicy, "CostPolicy()"),
            "progress_meter": (dfx.AbstractProgressMeter, "diffrax.TextProgressMeter()"),
        }
        for name, (kind, example) in kinds.items():
            check_instance("ParallelSolver", name, getattr(self, name), kind, example)
        if self.num_steps is None and self.predictor.stored_windows > 0:
            raise ValueError(
                f"`ParallelSolver({type(self.solver).__name__}(), predictor={self.predictor!r})`: this predictor stores the "
                "states of whole windows, so their number of steps must be given: `ParallelSolver(..., num_steps=...)`."
            )
        if isinstance(self.solver, ParallelSolver):
            raise ValueError(
                "`ParallelSolver(ParallelSolver(...))`: the fine step of a window cannot be a window. Use one "
                "`ParallelSolver` with more steps."
            )

    @property
    def capacity(self) -> int:
        """The number of steps for which a window has room."""
        return self.default_capacity() if self.num_steps is None else self.num_steps

    @property
    def scan_kind(self):
        # Diffrax reads this attribute of any wrapped Runge-Kutta method and replaces `None`, which has no forward mode. Step
        # maps choose a differentiable loop themselves.
        return "lax"

    def init(self, terms, t0, t1, y0, args) -> SolverState:
        """The state before the first window.

        Diffrax calls it. A loop that passes the state of each solve to the next calls it once before the first solve:
        `jax.jit(lambda: solver.init(term, t0, t1, y0, args))()`.
        """
        if self.num_steps is None:
            return self._with_size().init(terms, t0, t1, y0, args)
        dtype, ravel = time_dtype(t0, t1), Ravel(y0)
        t0, t1 = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
        shape = self._trajectory_shape(ravel.size)
        trajectory = None if shape is None else jnp.full(shape, jnp.inf, ravel.dtype)
        step_map = make_step_map(self.solver, terms, y0, args, self.root_finder, dtype)
        base_state = step_map.initial_solver_state(t0, t0 + (t1 - t0) / self.capacity, y0)
        pace = None
        if self.policy.follows_controller:
            # Only its structure counts. A later solve that this state is passed on to probably has a `PIDController`.
            followed = self._followed()
            controller = dfx.PIDController(1.0, 1.0) if followed is None else followed.controller
            structs = eqx.filter_eval_shape(lambda: self._initial_pace(controller, terms, t0, t1, y0, args))
            pace = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), structs)
        return SolverState.start(dtype, trajectory, base_state, pace)

    def default_capacity(self, lists_steps: bool = False) -> int:
        """The number of steps of a window that suits the controller. `lists_steps`: it knows where fine steps end."""
        solve = current_solve()
        if solve is not None and solve.events_at_ends and self.policy.follows_controller:
            # Diffrax looks for events at the ends of windows.
            return 1
        if solve is not None and adaptive_part(solve.controller) is not None:
            return _ADAPTIVE if self.policy.follows_controller else _EQUAL
        # Otherwise each step that the controller lays is a step of the user's.
        return _CONSTANT if lists_steps or self.grid is not None or self.ts is not None else 1

    def _with_size(self) -> "ParallelSolver":
        """The same solver with a number of steps."""
        solver = copy.copy(self)
        object.__setattr__(solver, "num_steps", self.capacity)
        return solver

    def _followed(self) -> Solve | None:
        """The solve that is being traced, if its controller chooses every step."""
        solve = current_solve()
        # (The controller of the windows chooses a single step itself.)
        follows = solve is not None and self.policy.follows_controller and adaptive_part(solve.controller) is not None
        follows = follows and self.capacity > 1
        return solve if follows else None

    def _initial_pace(self, controller, terms, t0, t1, y0, args) -> Pace:
        return initial_pace(controller, terms, t0, t1, y0, args, self.func, self.error_order(terms))

    def _trajectory_shape(self, size: int) -> tuple[int, int, int] | None:
        windows = self.predictor.stored_windows
        return (windows, self.capacity, size) if windows > 0 else None

    def fine_ts(self, dtype) -> Float[Array, " M1"]:
        """`ts` in Diffrax's internal time, which increases."""
        ts = jnp.asarray(self.ts, dtype)
        return jnp.where(ts[0] > ts[-1], -ts, ts)

    def lay(self, grid: UniformGrid):
        """Makes the fine steps of all windows those of `grid`, in this very object.

        `Windows` calls it. A step-size controller can tell a solver nothing but the ends of windows. `diffeqsolve` works on
        copies that `jax.jit` makes of its arguments, so the user's solver remains as it is.
        """
        object.__setattr__(self, "grid", grid)

    def _fine_times(self, t0, t1) -> tuple[Float[Array, " N1"], Int[ArrayLike, ""]]:
        """The ends of the fine steps of a window, and their number."""
        if self.grid is not None:
            return self.grid.window_times(t0, t1, self.capacity)
        if self.ts is None:
            return uniform_times(t0, t1, self.capacity), self.capacity
        ts, count, found = listed_times(self.fine_ts(jnp.result_type(t0)), t0, t1, self.capacity)
        message = (
            f"`ParallelSolver(num_steps={self.capacity}, ts=ts)`: a window must begin and end at two of `ts`, with at most "
            "`num_steps` steps between. Use `diffeqsolve(..., dt0=None, stepsize_controller=Windows())`."
        )
        return eqx.error_if(ts, ~found, message), count

    def _check_solver_state(self, state, size: int):
        """Raises if the user passed the state of another solver. `size` is the size of the ODE's state."""
        call = "`diffeqsolve(..., solver=ParallelSolver(...), solver_state=...)`"
        if not isinstance(state, SolverState):
            raise TypeError(f"{call}: expected the `solver_state` of an earlier solve, got `{state!r}`.")
        want = self._trajectory_shape(size)
        have = None if state.trajectory is None else jnp.shape(state.trajectory)
        if have != want:
            raise ValueError(
                f"{call}: this solver keeps a trajectory of shape {want} (windows, steps, size of the state), but the given "
                f"one has shape {have}. Pass the state of the same solver on the same problem, or `solver.init(...)`."
            )

    def step(self, terms, t0, t1, y0, args, solver_state: SolverState, made_jump):
        if self.num_steps is None:
            return self._with_size().step(terms, t0, t1, y0, args, solver_state, made_jump)
        self._check_solver_state(solver_state, Ravel(y0).size)
        step_map = make_step_map(self.solver, terms, y0, args, self.root_finder, jnp.result_type(t0))
        if step_map.has_solver_state and self.predictor.stored_windows > 0:
            raise ValueError(
                f"`ParallelSolver({type(self.solver).__name__}(), predictor={self.predictor!r})`: the trajectory of an "
                "earlier solve does not contain the state of this base solver. Use `CoarsePredictor()`."
            )
        if (solve := self._followed()) is not None:
            return self._controlled_step(solve, step_map, terms, t0, t1, y0, args, solver_state, made_jump)
        ts, count = self._fine_times(t0, t1)
        before = solver_state.at(t0, made_jump, step_map.initial_solver_state(t0, ts[1], y0))
        step_map, state = step_map.begin(t0, y0, before.base_state, made_jump)
        before = stop_gradient(before)
        window = Window.make(step_map, self.solver.interpolation_cls, ts, state, count)
        prepared = (None, self.predictor) if window.ravel.size == 0 else self.predictor.prepare(stop_gradient(window))
        fine_ts, predictor = prepared
        if fine_ts is not None and self.ts is not None:
            raise ValueError(
                f"`ParallelSolver(ts=ts, predictor={self.predictor!r})`: this predictor chooses the fine steps by itself. "
                "Omit `ts`, or use `CoarsePredictor()`."
            )
        window = window.with_times(keep_in_checkpoint(fine_ts))
        solve = current_solve()
        few_outputs = False
        if solve is not None and not solve.keeps_dense_output:
            # (A GPU makes all steps once more in no more time than one.)
            few_outputs = on_cpu(self.policy.kernels) and sum(ts.size for ts in solve.requested) < self.capacity
        solution, steps, infos = self._solve(window, predictor, before.next_trajectory(), few_outputs)

        result = _first_result(dfx.RESULTS.promote(solution.result), steps.result)
        succeeded = result == dfx.RESULTS.successful
        y1, base_state = step_map.end(window.ravel.unravel(solution.y[-1]))
        failed = ~succeeded
        if not self.policy.splits_windows(self.capacity):
            failed = failed | (solution.counts.parallel_steps < count)
        tolerance = (self.root_finder.rtol, self.root_finder.atol)
        y_error = window_error(window, solution.y, steps.y_error, tolerance, failed)
        begin, end = stop_gradient((t0, t1))
        statistics = before.statistics.add(solution.counts, self.capacity, count, end - begin)
        # A wrong trajectory is not passed on.
        trajectory = jnp.where(succeeded, stop_gradient(solution.y), jnp.inf)
        solved = solution.finite & solution.finished & (steps.result == dfx.RESULTS.successful)
        segments = solution.counts.segments
        states = None
        if solve is not None and solve.event is not None and may_end_elsewhere(self.solver):
            states, _ = step_map.end(jax.vmap(window.ravel.unravel)(solution.y))
        known = {"segments": segments, "states": states}
        fine_steps = FineSteps(window.ts, infos, solution.finite, solved, window.ts[-1], **known)
        pace = None if solver_state.pace is None else solver_state.pace.unknown()
        state = before.after(statistics, end, trajectory, base_state, pace)
        return y1, y_error, fine_steps.as_dense_info(), state, result

    def _controlled_step(self, solve: Solve, step_map, terms, t0, t1, y0, args, solver_state: SolverState, made_jump):
        """A window whose steps the adaptive controller chooses."""
        pace = self._initial_pace(solve.controller, terms, t0, t1, y0, args)
        base_state = step_map.initial_solver_state(t0, t0 + pace.length, y0)
        before = solver_state.at(t0, made_jump, base_state, pace)
        step_map, state = step_map.begin(t0, y0, before.base_state, made_jump)
        before = stop_gradient(before)
        assert before.pace is not None
        start = WindowStart(t0, t1, state, args, before.pace, made_jump)
        window = make_controlled_window(
            step_map,
            self.solver,
            solve,
            start,
            self.error_order(terms),
            self.capacity,
            before.trajectory is not None,
            self.policy.kernels,
        )
        outcome = window.outcome
        y1, base_state = step_map.end(window.y1)
        begin, end = stop_gradient((t0, t1))
        counts = dataclasses.replace(Counts.none(outcome.y.dtype), in_kernel=outcome.in_kernel)
        rejected = outcome.tried - outcome.count
        statistics = before.statistics.add(counts, self.capacity, outcome.count, end - begin, rejected)
        pace, kept = outcome.pace, solver_state.pace
        if kept is None or not kept.like(pace):
            # A loop's state does not change its structure.
            pace = None if kept is None else kept.unknown()
        trajectory = None if window.y is None else stop_gradient(window.y)
        state = before.after(statistics, end, trajectory, base_state, pace)
        return y1, window.y_error, window.fine_steps.as_dense_info(), state, window.result

    # Diffrax traces a step three times. A jitted function is traced once.
    @eqx.filter_jit
    def _solve(
        self, window: Window, predictor: AbstractPredictor, trajectory: Float[Array, " N D"] | None, few_outputs: bool
    ) -> tuple[RecurrenceSolution, StepOutput, PyTree]:
        """All steps of a window, the outputs of each at the solution, and dense output for `FineSteps`. With
        `few_outputs`, that of sequential steps is made where it is wanted. `trajectory` is that of the previous solve."""
        # The times are a small array, and first guesses read them out of order.
        window = eqx.tree_at(lambda window: window.ts, window, scan_of(self.root_finder).replicate(window.ts))
        recurrence = window.recurrence()
        if window.ravel.size == 0:
            # A state without numbers: there is nothing to solve.
            y = jnp.zeros((self.capacity, 0), window.ravel.dtype)
            counts = eqx.tree_at(lambda c: c.parallel_steps, Counts.none(y.dtype), jnp.array(self.capacity))
            solution = RecurrenceSolution.complete(y, counts)
            steps = window.evaluate_steps(recurrence, y, solution.finite)
            return solution, steps, steps.dense_info
        solution = solve_recurrence(
            recurrence,
            predictor.guess(stop_gradient(window), trajectory),
            root_finder=self.root_finder,
            max_steps=self.root_find_max_steps,
            policy=self.policy,
            meter=None if isinstance(self.progress_meter, dfx.NoProgressMeter) else self.progress_meter,
            eps=window.ravel.eps,
            count=None if isinstance(window.count, int) else window.count,
            step_size=stop_gradient((window.ts[-1] - window.ts[0]) / jnp.asarray(window.count, window.ts.dtype)),
        )
        steps = window.evaluate_steps(recurrence, solution.y, solution.finite)
        if solution.sequential and few_outputs:
            repeated = window.repeated_steps(recurrence, solution.y, solution.finite)
            if repeated.can_be_kept:
                return solution, steps, repeated
        return solution, steps, steps.dense_info


def _first_result(result: dfx.RESULTS, step_results: dfx.RESULTS) -> dfx.RESULTS:
    """`result` if it is a failure, else the first failure that the step map of a fine step reported, if any."""
    index = num_leading_true(step_results == dfx.RESULTS.successful)
    first = jtu.tree_map(lambda x: row_at(x, index), step_results)
    return dfx.RESULTS.where(result == dfx.RESULTS.successful, first, result)
