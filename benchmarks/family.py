"""Every method of the family on recurrences, from a constant guess: iterations, and difference from the sequential answer.

Iterations depend on the machine only through rounding, where iterates overshoot. Scans are sequential here, since these
compile faster.
"""

import argparse
import concurrent.futures
import multiprocessing
import pathlib
import time
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

import parallel_diffrax as pdx

from . import harness, recurrences


jax.config.update("jax_enable_x64", True)
MAX_STEPS = 200
SCAN = pdx.scans.SequentialScan()
FIXED = [0.0, 1e-10, 1e-8, 1e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1]


@eqx.filter_jit
def solve(problem_fn, root_finder, init, xs, max_steps):
    """One solve from a constant guess by `optimistix.root_find`."""
    guess = jnp.broadcast_to(init, (xs.shape[0], init.size))
    return optx.root_find(problem_fn, root_finder, guess, (init, xs), max_steps=max_steps, throw=False)


def row(name, problem, reference, method, jacobian, root_finder, max_steps=MAX_STEPS) -> dict:
    """Solves one problem by one method, and compares with the sequential answer."""
    start = time.perf_counter()
    sol = solve(problem.residual, root_finder, problem.init, problem.xs, max_steps)
    assert np.isfinite(sol.value).all(), (name, method, jacobian)
    difference = np.max(np.abs(np.asarray(sol.value) - reference) / (1 + np.abs(reference)))
    return {
        "problem": name,
        "method": method,
        "jacobian": jacobian,
        "iterations": int(sol.stats["num_steps"]),
        "successful": bool(sol.result == optx.RESULTS.successful),
        "num_converged": int(sol.stats["report"].num_converged),
        "num_steps": problem.xs.shape[0],
        "difference": float(difference),
        "seconds": time.perf_counter() - start,
    }


def newton_without_safeguards(problem) -> str:
    """The number of plain Newton iterations, or how they fail."""

    def f(y, x):
        return problem.step(y, x)

    @jax.jit
    def update(y):
        previous = jnp.concatenate([problem.init[None], y[:-1]])
        r = jax.vmap(f)(previous, problem.xs) - y
        A = jax.vmap(jax.jacfwd(f))(previous, problem.xs)

        def body(d, element):
            A, r = element
            d = A @ d + r
            return d, d

        return jax.lax.scan(body, jnp.zeros_like(r[0]), (A, r))[1]

    y = jnp.broadcast_to(problem.init, (problem.xs.shape[0], problem.init.size))
    for k in range(1, MAX_STEPS + 1):
        d = update(y)
        y = y + d
        if not np.isfinite(y).all():
            return f"overflow in iteration {k}"
        if np.all(np.abs(d) <= 1e-8 * np.max(np.abs(y))):
            return str(k)
    return f"> {MAX_STEPS}"


def family(name, problem) -> list[dict]:
    """Every approximation under both root finders."""
    reference = np.asarray(problem.sequential())
    rows = []
    for label, jacobian in recurrences.approximations(problem.init.size, problem.parts).items():
        for finder in (pdx.ParallelNewton, pdx.ELK):
            root_finder = finder(jacobian=jacobian, scan=SCAN)
            rows.append(row(name, problem, reference, finder.__name__, label, root_finder))
    return rows


def unstable(name, problem) -> list[dict]:
    """Newton, ELK, and ELK with each fixed damping of a sweep. The best fixed damping also has a row of its own."""
    reference = np.asarray(problem.sequential())
    rows = [{"problem": name, "method": "Newton without safeguards", "outcome": newton_without_safeguards(problem)}]
    finders = {
        "ParallelNewton": pdx.ParallelNewton(scan=SCAN),
        "ELK": pdx.ELK(scan=SCAN),
        "ELK, smoother": pdx.ELK(scan=SCAN, estimator=pdx.damping.KalmanSmoother()),
    }
    for method, root_finder in finders.items():
        rows.append(row(name, problem, reference, method, "Dense", root_finder))
    fixed = []
    for value in FIXED:
        root_finder = pdx.ELK(scan=SCAN, damping=pdx.damping.FixedDamping(jnp.array(value)))
        fixed.append(row(name, problem, reference, f"ELK, fixed {value:g}", "Dense", root_finder))
    best = min((r for r in fixed if r["successful"]), key=lambda r: r["iterations"], default=None)
    if best is not None:
        rows.append({**best, "method": "ELK, best fixed", "damping": best["method"].split()[-1]})
    rows += fixed
    return rows


def memory(
    approximations: dict, scan=pdx.scans.AssociativeScan(), num_steps: int = 100_000, size: int = 256
) -> list[dict]:
    """Peak temporary memory of compiled solves with diagonal approximations, in arrays of `N x D`."""
    problem = recurrences.mlp(2, size)
    xs = jax.ShapeDtypeStruct((num_steps, size), jnp.float64)
    guess = jax.ShapeDtypeStruct((num_steps, size), jnp.float64)
    rows = []
    for label, jacobian in approximations.items():
        for finder in (pdx.ParallelNewton, pdx.ELK):

            def run(guess, xs, root_finder=finder(jacobian=jacobian, scan=scan)):
                args = (problem.init, xs)
                return optx.root_find(problem.residual, root_finder, guess, args, max_steps=50, throw=False).value

            analysis = jax.jit(run).lower(guess, xs).compile().memory_analysis()
            assert analysis is not None
            arrays = analysis.temp_size_in_bytes / (8 * num_steps * size)
            rows.append({"method": finder.__name__, "jacobian": label, "temporary arrays of N x D": arrays})
    return rows


PARTS = [*recurrences.TABLE, *(f"unstable: {name}" for name in recurrences.UNSTABLE), "memory"]


def run(part: str) -> list[dict]:
    """Runs one part of the comparison."""
    if part == "memory":
        hutchinson = pdx.jacobians.Hutchinson(4, jax.random.key(0))
        return memory(
            {"Diagonal": pdx.jacobians.Diagonal(), "Hutchinson(4)": hutchinson, "Identity": pdx.jacobians.Identity()}
        )
    if part.startswith("unstable: "):
        name = part.removeprefix("unstable: ")
        return unstable(name, recurrences.UNSTABLE[name]())
    return family(part, recurrences.TABLE[part]())


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part of `python -m benchmarks`, in one process."""
    for part in PARTS[:1] if quick else PARTS:
        yield from run(part)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results")
    options = parser.parse_args()
    parts = [options.only] if options.only else PARTS
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        found = [row for part in pool.map(run, parts) for row in part]
    harness.write("family", found, options.out)
    columns = ["problem", "method", "jacobian", "damping", "iterations", "successful", "difference", "outcome"]
    print(harness.table([r for r in found if "fixed " not in r["method"] or "best" in r["method"]], columns))


if __name__ == "__main__":
    main()
