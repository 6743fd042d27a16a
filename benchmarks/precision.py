"""Time against error at the end state: parallel with a fixed number of steps against adaptive sequential Diffrax.

- Four smooth problems: Tsit5 in parallel on equal steps, against Tsit5 and Dopri8 under a `PIDController`.
- Four stiff problems: Kvaerno5 in parallel on the grid of an `AdaptivePredictor`, against Kvaerno5 and, while 20000 steps
  suffice, Tsit5.

Errors are measured against `references.json`.

A row `run` is a single run. A row `equal` compares all methods at one achieved error: the error of a parallel run and, for
FitzHugh-Nagumo, also 1e-6 and 1e-9. The time of a method at that error is interpolated between two runs in the logarithms of
time and error. A method has no time there if none of its runs is as accurate.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import diffrax as dfx
import jax.numpy as jnp

from . import harness, smooth_problems, stiff_problems
from .references import load
from .smooth_problems import Smooth
from .stiff import one_window


Problem = Smooth | stiff_problems.Stiff

# Name: numbers of parallel steps.
SMOOTH = {
    "FitzHugh-Nagumo, T = 400": [4096, 6144],
    "Lotka-Volterra, T = 100": [8192, 32768],
    "van der Pol, mu = 1, T = 200": [4096, 16384],
    "Kepler, T = 60": [2048, 8192],
}
STIFF = {
    "van der Pol, mu = 10": [1024, 4096],
    "Robertson, T = 1e5": [256, 1024],
    "HIRES": [256, 1024],
    "Robertson, T = 1e11": [512, 2048],
}
TARGETS = {"FitzHugh-Nagumo, T = 400": [1e-6, 1e-9]}
# Base solver and tolerances of the sequential runs.
SMOOTH_RUNS = {
    "Tsit5": (dfx.Tsit5(), [1e-4, 1e-6, 1e-8, 1e-10, 1e-12]),
    "Dopri8": (dfx.Dopri8(), [1e-4, 1e-6, 1e-8, 1e-10, 1e-12]),
}
STIFF_RUNS = {"Kvaerno5": (dfx.Kvaerno5(), [1e-4, 1e-6, 1e-8]), "Tsit5": (dfx.Tsit5(), [1e-4, 1e-6, 1e-8])}
_MOST_EXPLICIT_STEPS = 20_000


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    references = load()
    sizes = SMOOTH | STIFF
    if quick:
        sizes = {"FitzHugh-Nagumo, T = 400": [4096], "Robertson, T = 1e5": [256]}
    problems: dict[str, Problem] = {**smooth_problems.PROBLEMS, **stiff_problems.PROBLEMS}
    for group in (SMOOTH, STIFF):
        yield from compare_all({name: sizes[name] for name in group if name in sizes}, problems, references, quick)


def compare_all(sizes, problems, references, quick: bool) -> Iterator[dict]:
    """Yields the rows of all problems of one kind. Their programs are compiled together."""
    fns = {}
    for name, counts in sizes.items():
        fns |= {(name, *key): fn for key, fn in functions(problems[name], counts).items()}
    programs = harness.build_all(fns)
    for name, counts in sizes.items():
        runs = []
        mine = {key[1:]: program for key, program in programs.items() if key[0] == name}
        for row in compare(problems[name], counts, mine, references[name], quick):
            runs.append({"what": "run", "problem": name, "stiff": name in STIFF} | row)
            yield runs[-1]
        errors = [run["error"] for run in runs if run["method"] == "parallel" and run["success"]]
        for error in [*TARGETS.get(name, []), *errors]:
            yield {"what": "equal", "problem": name, "stiff": name in STIFF} | at_equal_error(runs, error)


def functions(problem: Problem, counts: list[int]) -> dict:
    """The functions to compile for one problem, each with an argument."""
    y0, methods = jnp.asarray(problem.y0), STIFF_RUNS if isinstance(problem, stiff_problems.Stiff) else SMOOTH_RUNS
    fns: dict = {("parallel", n): (parallel(problem, n), y0) for n in counts}
    for method, (base, _) in methods.items():
        fns["diffrax", method] = (adaptive(problem, base), (y0, jnp.asarray(1e-4)))
    return fns


def compare(problem: Problem, counts: list[int], programs, reference, quick: bool) -> Iterator[dict]:
    """Yields the runs on one problem."""
    stiff = isinstance(problem, stiff_problems.Stiff)
    methods = STIFF_RUNS if stiff else SMOOTH_RUNS
    starts = [jnp.asarray(problem.y0 * (1 + 1e-9 * k)) for k in range(3)]
    for n in counts:
        program = programs["parallel", n]
        (y, done), times = harness.clock(program.call, starts, 5 if quick else 11)
        row = {"method": "parallel", "base": "Kvaerno5" if stiff else "Tsit5", "setting": n}
        yield row | {"error": problem.error(y, reference)} | times | done_row(done) | program.times
    for method, (_, tolerances) in methods.items():
        program = programs["diffrax", method]
        for k, tolerance in enumerate(tolerances[:2] if quick else tolerances):
            inputs = [(y0, jnp.asarray(tolerance)) for y0 in starts]
            (y, steps, success), times = harness.clock(program.call, inputs, 1 if stiff else 2, warm=k == 0)
            row = {"method": method, "base": method, "setting": tolerance, "error": problem.error(y, reference)}
            yield row | times | {"success": bool(success), "steps": int(steps)} | program.times
            if not bool(success):
                # A smaller tolerance would need even more steps.
                break


def parallel(problem: Problem, num_steps: int) -> Callable:
    """A function from an initial state to the end state and the statistics of the solve."""
    if isinstance(problem, Smooth):
        return smooth_problems.parallel(problem, num_steps)
    solve = one_window(problem, num_steps)

    def with_counts(y0):
        ys, success, _, state = solve(y0)
        assert ys is not None
        return ys[-1], {name: getattr(state, name) for name in smooth_problems.COUNTS} | {"success": success}

    return with_counts


def adaptive(problem: Problem, base) -> Callable:
    """A function from an initial state and a tolerance to the end state, the number of steps, and whether it succeeded."""
    if isinstance(problem, Smooth):
        return smooth_problems.adaptive(problem, base)
    most = 200_000 if isinstance(base, dfx.AbstractImplicitSolver) else _MOST_EXPLICIT_STEPS

    def solve(start):
        y0, tolerance = start
        controller = dfx.PIDController(rtol=tolerance, atol=problem.atol * tolerance / 1e-6)
        sol = dfx.diffeqsolve(
            problem.term, base, 0.0, problem.t1, None, y0, problem.args,
            stepsize_controller=controller, max_steps=most, throw=False,
        )  # fmt: skip
        assert sol.ys is not None
        return sol.ys[-1], sol.stats["num_steps"], sol.result == dfx.RESULTS.successful

    return solve


done_row = smooth_problems.counts_row


def at_equal_error(runs: list[dict], error: float) -> dict:
    """The time of each method at a given error, its ratio to the parallel time, and the smallest of these ratios."""
    times = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        found = [(run["error"], run["median_ms"]) for run in runs if run["method"] == method and run["success"]]
        times[method] = time_at(found, error)
    others = [time for method, time in times.items() if method != "parallel" and time is not None]
    mine = times["parallel"]
    row = {"error": error} | {f"{method} ms": time for method, time in times.items()}
    if mine is None:
        return row | {"speedup": None}
    row |= {f"over {name}": time / mine for name, time in times.items() if name != "parallel" and time is not None}
    return row | {"speedup": min(others) / mine if others else None}


def time_at(found: list[tuple[float, float]], target: float) -> float | None:
    """The least time at which the error is at most the target, from pairs of error and time.

    Candidates are the runs that are as accurate, and the points between two neighbouring runs, linear in the logarithms of
    time and error. `None` if no run is as accurate.
    """
    found = sorted(found, reverse=True)
    candidates = [time for error, time in found if error <= target]
    for (coarse, t_coarse), (fine, t_fine) in itertools.pairwise(found):
        if coarse > target >= fine > 0:
            share = math.log(coarse / target) / math.log(coarse / fine)
            candidates.append(t_coarse ** (1 - share) * t_fine**share)
    return min(candidates, default=None)
