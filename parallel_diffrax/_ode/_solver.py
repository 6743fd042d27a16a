"""The solver that is given to `diffrax.diffeqsolve`."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, ArrayLike, Float, Int

from .._recurrence import (
    AbstractPolicy,
    AdaptivePolicy,
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
from ._interpolation import window_interpolation
from ._predictor import AbstractPredictor, CoarsePredictor
from ._statistics import WindowStatistics
from ._step_map import make_step_map, StepOutput
from ._window import listed_times, uniform_times, Window, window_error


def _as_times(ts: ArrayLike | None) -> Array | None:
    """As an array of floating-point numbers."""
    if ts is None:
        return None
    ts = jnp.asarray(ts)
    return ts if jnp.issubdtype(ts.dtype, jnp.floating) else ts.astype(jnp.result_type(float))


class ParallelSolver(dfx.AbstractImplicitSolver, dfx.AbstractWrappedSolver):
    """Solves many steps of a Diffrax solver at once, in parallel over time.

    Each Diffrax step becomes a *window* of `num_steps` fine steps of the base solver, which are solved together as one
    system of equations `y[i] = Phi(t[i], t[i+1], y[i-1])`. The result is the base solver's on the same fine grid.

    ```python
    solver = pdx.ParallelSolver(diffrax.Tsit5(), num_steps=4096)
    sol = diffrax.diffeqsolve(term, solver, t0, t1, dt0=t1 - t0, y0=y0)
    ```

    With `stepsize_controller=pdx.Windows()`, `dt0` is the fine step, as it is for Diffrax's own solvers. With
    `ConstantStepSize`, `dt0` is the length of a window: `dt0=t1 - t0` makes the whole solve one window. With
    `StepTo(ts)`, each interval of `ts` is one. With a `PIDController` windows adapt: one that does not converge is rejected
    and retried shorter, one that does is accepted on the sum of its fine steps' error estimates.

    `SaveAt(steps=True)`, events and progress meters see the ends of windows only: a float event that crosses zero an even
    number of times inside one window is missed, and of several crossings one is found. Choose windows shorter than the
    time between crossings, or `adjoint=ParallelAdjoint()`, which looks at all fine steps.

    **Arguments:**

    - `solver`: the base solver: any Diffrax solver.
    - `num_steps`: the number of fine steps in a window, at least 1.
    - `root_finder`: solves the steps of a window together. With `diffrax.with_stepsize_controller_tols(ParallelNewton)()`
        it takes its tolerances from an adaptive step-size controller.
    - `root_find_max_steps`: the largest number of iterations per window.
    - `predictor`: the first guess.
    - `fallback`: the policy: what is solved in parallel, and what happens to steps that were not solved by then. By
        default a window that is too long for its dynamics is cut, and what cannot be solved in parallel is made one step
        after the other, so that it is right in any case.
    - `ts`: the ends of all fine steps of the solve, of shape `(M + 1,)`, from its `t0` to its `t1`, if they are not to be
        of one length in a window. To be used with `stepsize_controller=pdx.Windows()` and `dt0=None`; windows must begin
        and end at some of them, with at most `num_steps` steps between. Differentiable.
    - `progress_meter`: shows how far each window is: for windows that are cut into many segments, or made in sequence.
        (The one that `diffeqsolve` takes moves from window to window.) `AdaptivePolicy` and `ParallelThenSequential` move it.

    **Results:** `diffrax.RESULTS.successful` only if the equation of every fine step holds to tolerance, or the step was
    made sequentially, and every state is finite. Otherwise `nonfinite`, `nonlinear_divergence`,
    `nonlinear_max_steps_reached`, or what the base solver's own step reported. A window that failed has an infinite error
    estimate, so that an adaptive controller rejects it; so has one that was not solved in parallel, if the policy does not
    cut windows of so many steps.

    **Statistics:** with `SaveAt(..., solver_state=True)`, `sol.solver_state` is a `WindowStatistics`.

    Cost of a window of `N` steps of a `D`-dimensional state: the predictor's sequential steps; per iteration `N (D + 1)`
    evaluations of a step, in parallel, and a scan of depth `2 log2 N`; one more evaluation of all steps. Memory `N D^2`.
    The derivative takes one (reverse) linear scan a window and no iterations.

    **Raises:** `TypeError` or `ValueError` for a `num_steps` that is not a positive integer, and for a base solver that
    carries from step to step what is not a floating-point number.

    ??? cite "References"

        Lim et al., "Parallelizing non-linear sequential models over the sequence length", arXiv 2309.12252 (2023).

        Gonzalez, "Parallel Newton methods", arXiv 2603.16850 (2026).
    """

    solver: dfx.AbstractSolver
    num_steps: int = eqx.field(static=True)
    root_finder: optx.AbstractRootFinder = ParallelNewton()
    root_find_max_steps: int = eqx.field(static=True, default=32)
    predictor: AbstractPredictor = CoarsePredictor()
    policy: AbstractPolicy = AdaptivePolicy()
    ts: Float[Array, " M1"] | None = eqx.field(default=None, converter=_as_times)
    progress_meter: dfx.AbstractProgressMeter = dfx.NoProgressMeter()

    def __check_init__(self):
        if self.ts is not None and (self.ts.ndim != 1 or self.ts.shape[0] < 2):
            raise ValueError(
                f"`ParallelSolver(ts=...)`: the ends of fine steps must be a vector of at least two times, got shape "
                f"{self.ts.shape}."
            )
        check_integer("ParallelSolver", "num_steps", self.num_steps, "the number of fine steps in a window")
        name, value = "root_find_max_steps", self.root_find_max_steps
        check_integer("ParallelSolver", name, value, "the largest number of iterations")
        kinds = {
            "solver": (dfx.AbstractSolver, "diffrax.Tsit5()"),
            "root_finder": (optx.AbstractRootFinder, "ParallelNewton()"),
            "predictor": (AbstractPredictor, "CoarsePredictor()"),
            "policy": (AbstractPolicy, "AdaptivePolicy()"),
            "progress_meter": (dfx.AbstractProgressMeter, "diffrax.TextProgressMeter()"),
        }
        for name, (kind, example) in kinds.items():
            check_instance("ParallelSolver", name, getattr(self, name), kind, example)
        if isinstance(self.solver, ParallelSolver):
            raise ValueError(
                "`ParallelSolver(ParallelSolver(...))`: a window cannot be the fine step of another. Use one "
                "`ParallelSolver` with more steps."
            )

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def interpolation_cls(self):  # pyright: ignore
        return window_interpolation(self.solver.interpolation_cls)

    @property
    def scan_kind(self):
        # Diffrax reads this of anything that wraps a Runge-Kutta method, to make it differentiable where it is not by
        # default. Step maps see to that themselves.
        return "lax"

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms, t0, t1, y0, args) -> WindowStatistics:
        """The state before the first window. Diffrax calls it; a loop that hands the state of one solve to the next calls
        it before the first: `jax.jit(lambda: solver.init(term, t0, t1, y0, args))()`."""
        time_dtype = jnp.result_type(t0, t1)
        dtype = time_dtype if jnp.issubdtype(time_dtype, jnp.floating) else jnp.result_type(float)
        ravel, windows = Ravel(y0), self.predictor.memory
        shape = (windows, self.num_steps, ravel.size)
        trajectory = jnp.full(shape, jnp.nan, ravel.dtype) if windows > 0 else None
        step_map = make_step_map(self.solver, terms, y0, args, self.root_finder, dtype)
        memory = step_map.initial_solver_state(t0, t0 + (t1 - t0) / self.num_steps, y0)
        return WindowStatistics.start(dtype, trajectory, memory)

    def fine_ts(self, dtype) -> Float[Array, " M1"]:
        """`ts` in Diffrax's own time, which increases."""
        ts = jnp.asarray(self.ts, dtype)
        return jnp.where(ts[0] > ts[-1], -ts, ts)

    def _fine_times(self, t0, t1) -> tuple[Float[Array, " N1"], Int[ArrayLike, ""]]:
        """The ends of the fine steps of a window, and how many there are."""
        if self.ts is None:
            return uniform_times(t0, t1, self.num_steps), self.num_steps
        ts, count, found = listed_times(self.fine_ts(jnp.result_type(t0)), t0, t1, self.num_steps)
        message = (
            f"`ParallelSolver(num_steps={self.num_steps}, ts=ts)`: a window must begin and end at two of `ts`, with at most "
            "`num_steps` steps between. Use `diffeqsolve(..., dt0=None, stepsize_controller=Windows())`."
        )
        return eqx.error_if(ts, ~found, message), count

    def _check_solver_state(self, state, y0):
        """A state that the user handed in must be one of this solver."""
        call = "`diffeqsolve(..., solver=ParallelSolver(...), solver_state=...)`"
        if not isinstance(state, WindowStatistics):
            raise TypeError(f"{call}: expected the `solver_state` of an earlier solve, got `{state!r}`.")
        memory, ravel = self.predictor.memory, Ravel(y0)
        want = (memory, self.num_steps, ravel.size) if memory > 0 else None
        have = None if state.trajectory is None else jnp.shape(state.trajectory)
        if have != want:
            raise ValueError(
                f"{call}: this solver keeps a trajectory of shape {want} (windows, steps, size of the state), and the given "
                f"one has {have}. Hand in what the same solver left of the same problem, or `solver.init(...)`."
            )

    def step(self, terms, t0, t1, y0, args, solver_state: WindowStatistics, made_jump):
        _check_state(y0)
        self._check_solver_state(solver_state, y0)
        step_map = make_step_map(self.solver, terms, y0, args, self.root_finder, jnp.result_type(t0))
        if step_map.has_solver_state and self.predictor.memory > 0:
            raise ValueError(
                f"`ParallelSolver({type(self.solver).__name__}(), predictor={self.predictor!r})`: the trajectory of an "
                "earlier solve does not say what this solver remembers. Use `CoarsePredictor()`."
            )
        ts, count = self._fine_times(t0, t1)
        before = solver_state.at(t0, made_jump, step_map.initial_solver_state(t0, ts[1], y0))
        step_map, state = step_map.begin(t0, y0, before.memory, made_jump)
        before = stop_gradient(before)
        window = Window(step_map, self.solver.interpolation_cls, ts, state, count)
        fractions, predictor = self.predictor.prepare(stop_gradient(window))
        if fractions is not None and self.ts is not None:
            raise ValueError(
                f"`ParallelSolver(ts=ts, predictor={self.predictor!r})`: this predictor chooses the fine steps by "
                "itself. Leave `ts` out, or use `CoarsePredictor()`."
            )
        window = window.on(keep_in_checkpoint(fractions))
        solution, steps = self._solve(window, predictor, before.remembered())

        result = _first_result(dfx.RESULTS.promote(solution.result), steps.result)
        y1, memory = step_map.end(window.ravel.unravel(solution.y[-1]))
        failed = result != dfx.RESULTS.successful
        if not self.policy.splits_windows(self.num_steps):
            failed = failed | (solution.counts.parallel_steps < self.num_steps)
        tolerance = (self.root_finder.rtol, self.root_finder.atol)
        y_error = window_error(window, solution.y, steps.y_error, tolerance, failed)
        # A trajectory that is wrong is not handed on.
        known = jnp.where(result == dfx.RESULTS.successful, stop_gradient(solution.y), jnp.nan)
        statistics = before.add(solution.counts, self.num_steps, count, *stop_gradient((t0, t1)), known, memory)
        solved = solution.finite & solution.finished & (steps.result == dfx.RESULTS.successful)
        dense_info = {"ts": window.ts, "infos": steps.dense_info, "finite": solution.finite, "solved": solved}
        return y1, y_error, dense_info, statistics, result

    # Diffrax traces a step three times. As a function of its own it is traced once.
    @eqx.filter_jit
    def _solve(self, window: Window, predictor: AbstractPredictor, remembered) -> tuple[RecurrenceSolution, StepOutput]:
        """All steps of a window, and what is read off each."""
        # Times are few numbers, and looked up out of order by first guesses.
        window = eqx.tree_at(lambda window: window.ts, window, scan_of(self.root_finder).replicate(window.ts))
        recurrence = window.recurrence()
        solution = solve_recurrence(
            recurrence,
            predictor.guess(stop_gradient(window), remembered),
            root_finder=self.root_finder,
            max_steps=self.root_find_max_steps,
            policy=self.policy,
            meter=None if isinstance(self.progress_meter, dfx.NoProgressMeter) else self.progress_meter,
            eps=window.ravel.eps,
            step_size=stop_gradient((window.ts[-1] - window.ts[0]) / window.count),
        )
        return solution, window.evaluate_steps(recurrence, solution.y, solution.finite)


def _first_result(result: dfx.RESULTS, step_results: dfx.RESULTS) -> dfx.RESULTS:
    """`result`, unless it is a success and the step map of a fine step reported a failure: then the first of those."""
    succeeded = step_results == dfx.RESULTS.successful
    index = num_leading_true(succeeded)
    first = jtu.tree_map(lambda x: row_at(x, index), step_results)
    return dfx.RESULTS.where(result == dfx.RESULTS.successful, first, result)


def _check_state(y0):
    if Ravel(y0).size == 0:
        raise ValueError(
            "`diffeqsolve(..., solver=ParallelSolver(...), y0=...)`: the state has no numbers in it, so there is nothing to "
            "solve in parallel. Use the base solver by itself."
        )
