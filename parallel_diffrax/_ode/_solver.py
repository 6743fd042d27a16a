"""The solver that is given to `diffrax.diffeqsolve`."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx

from .._recurrence import (
    AbstractFallback,
    first_failure,
    LyapunovFallback,
    ParallelNewton,
    Ravel,
    solve_recurrence,
    stop_gradient,
)
from ._interpolation import window_interpolation
from ._predictor import AbstractPredictor, CoarsePredictor, WindowGuess
from ._statistics import WindowStatistics
from ._step_map import make_step_map
from ._window import accumulate_error, uniform_times, Window


class ParallelSolver(dfx.AbstractImplicitSolver, dfx.AbstractWrappedSolver):
    """Solves many steps of a Diffrax solver at once, in parallel over time.

    Each Diffrax step becomes a *window* of `num_steps` fine steps of the base solver, which are solved together as one
    system of equations `y[i] = Phi(t[i], t[i+1], y[i-1])`. The result is the base solver's on the same fine grid.

    ```python
    solver = pdx.ParallelSolver(diffrax.Tsit5(), num_steps=4096)
    sol = diffrax.diffeqsolve(term, solver, t0, t1, dt0=t1 - t0, y0=y0)
    ```

    With `ConstantStepSize`, `dt0` is the length of a window: `dt0=t1 - t0` makes the whole solve one window. With
    `StepTo(ts)`, each interval of `ts` is one. With a `PIDController` windows adapt: one that does not converge is rejected
    and retried shorter, one that does is accepted on the sum of its fine steps' error estimates.

    `SaveAt(steps=True)`, events and progress meters see the ends of windows only: a float event that crosses zero an even
    number of times inside one window is missed, and of several crossings one is found. Choose windows shorter than the
    time between crossings.

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
    fallback: AbstractFallback = LyapunovFallback()

    def __check_init__(self):
        _check_count("num_steps", self.num_steps, "the number of fine steps in a window")
        _check_count("root_find_max_steps", self.root_find_max_steps, "the largest number of iterations")
        kinds = {
            "solver": (self.solver, dfx.AbstractSolver, "a Diffrax solver, for example `diffrax.Tsit5()`"),
            "root_finder": (self.root_finder, optx.AbstractRootFinder, "for example `ParallelNewton()`"),
            "predictor": (self.predictor, AbstractPredictor, "for example `CoarsePredictor()`"),
            "fallback": (self.fallback, AbstractFallback, "for example `LyapunovFallback()`"),
        }
        for name, (value, kind, hint) in kinds.items():
            if not isinstance(value, kind):
                raise TypeError(
                    f"`ParallelSolver({name}={value!r})`: expected an instance of `{kind.__name__}`, {hint}."
                )
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
        step_map = make_step_map(self.solver, terms, y0, args, self.root_finder)
        memory = step_map.first_memory(t0, t0 + (t1 - t0) / self.num_steps, y0)
        return WindowStatistics.start(jnp.result_type(t0), memory)

    def step(self, terms, t0, t1, y0, args, solver_state: WindowStatistics, made_jump):
        _check_state(y0)
        step_map = make_step_map(self.solver, terms, y0, args, self.root_finder)
        step_map, state = step_map.begin(t0, y0, solver_state.memory, made_jump)
        ts = uniform_times(t0, t1, self.num_steps)
        window = Window(step_map, self.solver.interpolation_cls, ts, state, self.num_steps)
        recurrence = window.recurrence()
        solution = solve_recurrence(
            recurrence,
            WindowGuess(self.predictor, stop_gradient(window)),
            root_finder=self.root_finder,
            max_steps=self.root_find_max_steps,
            fallback=self.fallback,
            eps=window.ravel.eps,
            step_size=stop_gradient((t1 - t0) / self.num_steps),
        )
        steps = window.sweep(recurrence, solution.y, solution.healthy)

        result = _first_result(dfx.RESULTS.promote(solution.result), steps.result)
        y1, memory = step_map.end(window.ravel.unravel(solution.y[-1]))
        failed = result != dfx.RESULTS.successful
        if not self.fallback.cuts(self.num_steps):
            failed = failed | (solution.counts.parallel_steps < self.num_steps)
        y_error = accumulate_error(steps.y_error, failed)
        statistics = solver_state.add(solution.counts, self.num_steps, stop_gradient(t1 - t0), memory)
        dense_info = {"ts": ts, "infos": steps.dense_info, "healthy": solution.healthy}
        return y1, y_error, dense_info, statistics, result


def _first_result(result: dfx.RESULTS, step_results: dfx.RESULTS) -> dfx.RESULTS:
    """`result`, unless it is a success and the step map of a fine step reported a failure: then the first of those."""
    succeeded = step_results == dfx.RESULTS.successful
    index = jnp.minimum(first_failure(succeeded), succeeded.shape[0] - 1)
    first = jtu.tree_map(lambda x: x[index], step_results)
    return dfx.RESULTS.where(result == dfx.RESULTS.successful, first, result)


def _check_state(y0):
    if Ravel(y0).size == 0:
        raise ValueError(
            "`diffeqsolve(..., solver=ParallelSolver(...), y0=...)`: the state has no numbers in it, so there is nothing to "
            "solve in parallel. Use the base solver by itself."
        )


def _check_count(name: str, value, meaning: str):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`ParallelSolver({name}={value!r})`: {meaning} must be an `int`, got {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"`ParallelSolver({name}={value!r})`: {meaning} must be at least 1.")
