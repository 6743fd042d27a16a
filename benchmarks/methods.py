"""Newton, quasi-Newton and ELK: the time that each takes to solve a recurrence from a constant guess.

The two recurrences come from `recurrences.py`: a Langevin chain in a two-well potential, on which plain Newton iterations
overshoot, and a gated recurrent unit, which forgets its past. Each root finder makes at most 200 iterations, and no step is
solved sequentially afterwards: `success` says whether the root finder solved all steps. The row `scan` is `lax.scan` over
the same steps at its fastest unrolling.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

import parallel_diffrax as pdx

from . import harness, recurrences


MAX_STEPS = 200
METHODS = {
    "Newton": pdx.ParallelNewton(),
    "quasi-Newton, diagonal": pdx.ParallelNewton(jacobian=pdx.jacobians.Diagonal()),
    "ELK": pdx.ELK(),
    "quasi-ELK, diagonal": pdx.ELK(jacobian=pdx.jacobians.Diagonal()),
}


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    if quick:
        problems = {"Langevin": recurrences.langevin(500)}
    else:
        problems = {"Langevin": recurrences.langevin(), "GRU": recurrences.gru()}
    for name, problem in problems.items():
        starts = [problem.init + 1e-3 * k for k in range(4)]
        about = {"problem": name, "N": problem.xs.shape[0], "D": problem.init.size}
        loops = {unroll: (loop(problem, unroll), starts[0]) for unroll in ((1,) if quick else (1, 4, 8, 16))}
        best, exact = None, np.nan
        for unroll, program in harness.build_all(loops).items():
            exact, times = harness.clock(program.call, starts, 5)
            row = about | {"method": "scan", "unroll": unroll} | times | program.times
            best = row if best is None or row["median_ms"] < best["median_ms"] else best
        assert best is not None
        yield best
        programs = harness.build_all(
            {method: (solve(problem, root_finder), starts[0]) for method, root_finder in METHODS.items()}
        )
        for method, program in programs.items():
            (y, iterations, success), times = harness.clock(program.call, starts, 7)
            row = about | {"method": method, "iterations": int(iterations), "success": bool(success)}
            difference = float(np.max(np.abs(y - exact) / (1 + np.abs(exact))))
            yield row | {"difference": difference, "speedup": best["median_ms"] / times["median_ms"]} | times


def loop(problem: recurrences.Problem, unroll: int) -> Callable:
    """A function that computes all states sequentially."""

    def body(y, x):
        y = problem.step(y, x)
        return y, y

    return lambda init: jax.lax.scan(body, init, problem.xs, unroll=unroll)[1]


def solve(problem: recurrences.Problem, root_finder: optx.AbstractRootFinder) -> Callable:
    """A function that solves for all states at once, and returns them, the number of iterations and whether it succeeded."""

    def run(init):
        guess = jnp.broadcast_to(init, problem.xs.shape[:1] + init.shape)
        sol = optx.root_find(problem.residual, root_finder, guess, (init, problem.xs), max_steps=MAX_STEPS, throw=False)
        return sol.value, sol.stats["num_steps"], sol.result == optx.RESULTS.successful

    return run
