"""Stiff problems: implicit Runge-Kutta methods, all steps at once on adaptive grids, against sequential Diffrax.

    python -m benchmarks.stiff [--only table|grid] [--problems NAME ...] [--quick] [--out FOLDER]

- `table`: every problem under `PIDController(rtol=1e-6)`, against `Kvaerno5` under the same controller, with SciPy's Radau
  method at 1e-12 as the reference: errors, iterations per window and sequential steps. It counts and does not time, so a
  CPU will do.
- `grid`: the same uniform grid of 16384 steps in parallel and sequentially (extrapolated from 512 steps). For a GPU.

`python -m benchmarks --only precision` measures time against error.
"""

import argparse
import pathlib
from collections.abc import Iterator

import diffrax as dfx
import jax
import jax.numpy as jnp
import optimistix as optx

import parallel_diffrax as pdx

from . import harness
from .stiff_problems import PROBLEMS, Stiff


def adaptive(problem: Stiff, num_steps: int, rtol: float = 1e-6):
    """Parallel, with windows that adapt to the tolerances."""
    atol = problem.atol * rtol / 1e-6
    solver = pdx.ParallelSolver(
        dfx.Kvaerno5(),
        num_steps,
        root_finder=dfx.with_stepsize_controller_tols(pdx.ParallelNewton)(),
        predictor=pdx.AdaptivePredictor(rtol=1e-3, atol=problem.atol),
        policy=pdx.AdaptivePolicy(),
    )
    return solve_with(problem, solver, problem.t1, dfx.PIDController(rtol, atol), 400)


def one_window(problem: Stiff, num_steps: int):
    """Parallel, the whole time span in one window."""
    predictor = pdx.AdaptivePredictor(rtol=1e-3, atol=problem.atol)
    finder = pdx.ParallelNewton(rtol=1e-9, atol=1e-3 * problem.atol)
    solver = pdx.ParallelSolver(
        dfx.Kvaerno5(), num_steps, root_finder=finder, predictor=predictor, policy=pdx.AdaptivePolicy()
    )
    return solve_with(problem, solver, problem.t1, dfx.ConstantStepSize(), 1)


def sequential(problem: Stiff, rtol: float):
    """Sequential Diffrax."""
    controller = dfx.PIDController(rtol, problem.atol * rtol / 1e-6)
    return solve_with(problem, dfx.Kvaerno5(), None, controller, 200_000)


def solve_with(problem: Stiff, solver: dfx.AbstractSolver, dt0, controller, max_steps: int):
    """A function from an initial state to the end state, whether it succeeded, the number of steps and the statistics."""

    def solve(y0):
        parallel = isinstance(solver, pdx.ParallelSolver)
        sol = dfx.diffeqsolve(
            problem.term,
            solver,
            0.0,
            problem.t1,
            dt0,
            y0,
            problem.args,
            saveat=dfx.SaveAt(t1=True, solver_state=parallel),
            stepsize_controller=controller,
            max_steps=max_steps,
            throw=False,
        )
        return (
            sol.ys,
            sol.result == dfx.RESULTS.successful,
            sol.stats["num_steps"],
            pdx.statistics(sol) if parallel else None,
        )

    return solve


def table(names, num_steps: int) -> list[dict]:
    rows = []
    for name in names:
        problem = PROBLEMS[name]
        reference = problem.reference()
        ys, success, made, state = jax.jit(adaptive(problem, num_steps))(problem.y0)
        base, base_success, base_steps, _ = jax.jit(sequential(problem, 1e-6))(problem.y0)
        solved = int(state.parallel_steps)
        rows.append(
            {
                "problem": name,
                "success": bool(success),
                "error": problem.error(ys, reference),
                "diffrax_error": problem.error(base, reference),
                "diffrax_success": bool(base_success),
                "diffrax_steps": int(base_steps),
                "windows": int(state.windows),
                "tried": int(made),
                "iterations": int(state.iterations),
                "most_in_a_window": int(state.max_iterations),
                "attempts": int(state.attempts),
                "parallel_steps": solved,
                "sequential_steps": int(state.sequential_steps),
                "parallel_share": solved / max(solved + int(state.sequential_steps), 1),
                "predictor_steps": int(state.predictor_steps),
            }
        )
        print(harness.table(rows[-1:], list(rows[-1])), flush=True)
    return rows


def inputs(problem: Stiff) -> list:
    return [problem.y0 * (1 + 1e-9 * k) for k in range(3)]


def grid(num_steps: int, reference_steps: int, repeats: int) -> list[dict]:
    problem = PROBLEMS["van der Pol, mu = 10"]
    solver = pdx.ParallelSolver(dfx.Kvaerno5(), num_steps, policy=pdx.AdaptivePolicy())
    ours = jax.jit(solve_with(problem, solver, problem.t1, dfx.ConstantStepSize(), 1))
    # Diffrax's default root finder needs tolerances. It also gives up on some steps, and no controller shortens these here.
    base = dfx.Kvaerno5(root_finder=optx.Newton(1e-8, 1e-10, norm=optx.max_norm), root_find_max_steps=30)
    part = jnp.asarray(problem.t1 / num_steps)

    def in_sequence(y0):
        return dfx.diffeqsolve(
            problem.term, base, 0.0, part * reference_steps, part, y0, problem.args, max_steps=reference_steps + 2
        ).ys

    mine = harness.measure(ours, inputs(problem), repeats)
    theirs = harness.measure(jax.jit(in_sequence), inputs(problem), 2)
    state = ours(problem.y0)[3]
    diffrax_ms = theirs["median_ms"] * num_steps / reference_steps
    return [
        {
            "problem": "van der Pol, mu = 10",
            "N": num_steps,
            "parallel_ms": mine["median_ms"],
            "diffrax_ms": diffrax_ms,
            "extrapolated_from": reference_steps,
            "speedup": diffrax_ms / mine["median_ms"],
            "iterations": int(state.iterations),
            "sequential_steps": int(state.sequential_steps),
            "predictor_steps": int(state.predictor_steps),
            "compile_s": mine["compile_s"],
        }
    ]


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part of `python -m benchmarks`: the comparison on one grid."""
    yield from grid(*((1024, 64, 3) if quick else (16384, 512, 5)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["table", "grid"])
    parser.add_argument("--problems", nargs="*")
    parser.add_argument("--num-steps", type=int, default=512)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    chosen = args.only or ("table" if args.quick else None)
    if chosen in (None, "table"):
        names = args.problems or (["HIRES"] if args.quick else list(PROBLEMS))
        found = []
        for name in names:
            found += table([name], args.num_steps)
            if not args.quick:
                harness.write("stiff_table", found, args.out)
    if chosen in (None, "grid"):
        found = list(rows(quick=False))
        print(harness.table(found, list(found[0])))
        harness.write("stiff_grid_gpu", found, args.out)


if __name__ == "__main__":
    main()
