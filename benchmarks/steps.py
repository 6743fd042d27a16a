"""Time against the number of steps: parallel, sequential Diffrax, the best loop written by hand, and gradients.

The problem is FitzHugh-Nagumo by Tsit5 on a grid of equal steps, in float64. Up to 16384 steps, the step size is
400 / 16384, so that few steps cover a short time span. Beyond, all solves cover T = 400. Each method has one row for each
length:

- `solve` has three methods. `parallel` starts with 16384 steps: the solve of `examples/quickstart.py`, and the first program
  that the process compiles. `diffrax` is timed up to 16384 steps and extrapolated beyond, since every step costs the same.
  `scan` is the loop by hand, in vectors, as users write fields, and in scalars, each at its fastest unrolling.
- `segments` is `parallel` by `MultipleShooting`, with eight steps in a shooting interval, for very many steps.
- `gradient` is the gradient of a loss on the end state: parallel with `DirectAdjoint` and with the default adjoint, and
  Diffrax with its default adjoint.
- `summary` compares the parallel time at one length with Diffrax and with the best of the loops.
"""

from collections.abc import Callable, Iterator

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

import parallel_diffrax as pdx

from . import harness
from .smooth_problems import counts_row, FITZHUGH_NAGUMO, hand_written, parallel, sequential


PROBLEM = FITZHUGH_NAGUMO
WHOLE = 16384
UNROLLS = (1, 4, 8, 16)
SUBSTEPS = 8


def span(num_steps: int) -> float:
    """The time span of `num_steps` steps."""
    return PROBLEM.t1 * min(num_steps / WHOLE, 1.0)


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    # The first length is compiled alone, before all else.
    lengths = [WHOLE, 64, 1024] if quick else [WHOLE, 64, 512, 4096, 262_144, 2**20]
    tuned = [WHOLE] if quick else [WHOLE, 262_144]
    repeats = 5 if quick else 15
    timed, ends = {}, {}
    for source in (
        solves(lengths, repeats, ends),
        segments([1024] if quick else [262_144, 2**20], repeats, ends),
        base_solves(lengths),
        loops(tuned, [n for n in lengths if n not in tuned], ends),
        slopes([256] if quick else [512, WHOLE], repeats, with_default=not quick),
    ):
        for row in source:
            timed.setdefault((row["what"], row["N"]), []).append(row)
            yield row
    for (what, n), found in timed.items():
        yield summary(what, n, found)


def solves(lengths, repeats: int, ends: dict) -> Iterator[dict]:
    """Yields whole solves by the library. Writes the end states to `ends`."""
    first, *others = lengths
    start = PROBLEM.starts(1)[0]
    programs = {first: harness.build(parallel(PROBLEM, first, span(first)), start)}
    for n in lengths:
        if n not in programs:
            programs |= harness.build_all({n: (parallel(PROBLEM, n, span(n)), start) for n in others})
        program = programs[n]
        (ends[n], counts), times = harness.clock(program.call, PROBLEM.starts(4), repeats)
        row = {"what": "solve", "method": "parallel", "N": n, "T": span(n), "quickstart": n == WHOLE}
        yield row | program.times | times | counts_row(counts)


def segments(lengths, repeats: int, ends: dict) -> Iterator[dict]:
    """Yields whole solves by multiple shooting, with the difference of their end states from `ends`."""
    base = pdx.MultipleShooting(dfx.Tsit5(), SUBSTEPS)
    fns = {n: (parallel(PROBLEM, n // SUBSTEPS, span(n), base), PROBLEM.starts(1)[0]) for n in lengths}
    for n, program in harness.build_all(fns).items():
        (y, counts), times = harness.clock(program.call, PROBLEM.starts(4), repeats)
        row = {"what": "segments", "method": f"parallel, {SUBSTEPS} steps a segment", "N": n, "T": span(n)}
        row |= {"difference": float(jnp.max(jnp.abs(y - ends[n]) / (1 + jnp.abs(y))))}
        yield row | program.times | times | counts_row(counts)


def base_solves(lengths) -> Iterator[dict]:
    """Yields whole solves by sequential Diffrax."""

    def start(k, count):
        return PROBLEM.starts(2)[k], jnp.asarray(count)

    # The time of a step does not depend on the number of steps, so one program serves all lengths.
    program = harness.build(sequential(PROBLEM, WHOLE, span(WHOLE) / WHOLE), start(0, WHOLE))
    per_step = 0.0
    for n in sorted(lengths):
        row = {"what": "solve", "method": "diffrax", "N": n, "T": span(n), "extrapolated": n > WHOLE}
        if n <= WHOLE:
            _, times = harness.clock(program.call, [start(0, n), start(1, n)], 3)
            per_step = times["median_ms"] / n
            yield row | program.times | times
        else:
            yield row | {"median_ms": per_step * n}


def loops(tuned, others, ends: dict) -> Iterator[dict]:
    """Yields `lax.scan` over the unrolled step, with the difference of its end states from `ends`.

    The `tuned` lengths are measured with every unrolling, the others with the unrolling that is fastest at the first tuned
    length.
    """
    best = {}
    for chosen in (tuned, others):
        fns = {}
        for n in chosen:
            forms = [(scalars, unroll) for scalars in (False, True) for unroll in UNROLLS]
            for scalars, unroll in forms if n in tuned else [(key, best[key][1]) for key in (False, True)]:
                fn = hand_written(PROBLEM, n, unroll, span(n), scalars)
                fns[n, scalars, unroll] = fn, PROBLEM.starts(1)[0]
        for (n, scalars, unroll), program in harness.build_all(fns).items():
            y, times = harness.clock(program.call, PROBLEM.starts(2), 5 if n <= WHOLE else 1)
            if n == tuned[0]:
                best[scalars] = min((times["median_ms"], unroll), best.get(scalars, (np.inf, 0)))
            row = {"what": "solve", "method": "scan", "form": "scalars" if scalars else "vectors", "unroll": unroll}
            row |= {"N": n, "T": span(n), "difference": float(jnp.max(jnp.abs(y - ends[n]) / (1 + jnp.abs(y))))}
            yield row | program.times | times


def slopes(lengths, repeats: int, with_default: bool) -> Iterator[dict]:
    """Yields gradients of the sum of squares of the end state with respect to the parameters."""
    starts = [jnp.asarray(PROBLEM.args) * (1 + 1e-3 * k) for k in range(4)]
    default = dfx.RecursiveCheckpointAdjoint()
    fns, longest = {}, max(lengths)
    for n in lengths:
        ours = pdx.ParallelSolver(dfx.Tsit5(), n, policy=pdx.AdaptivePolicy())
        fns["diffrax", n] = slope(n, dfx.Tsit5(), default), starts[0]
        fns["parallel, DirectAdjoint", n] = slope(n, ours, dfx.DirectAdjoint()), starts[0]
        if with_default and n == longest:
            fns["parallel, default adjoint", n] = slope(n, ours, default), starts[0]
    # One program is compiled alone, to measure its compile time.
    alone = ("parallel, DirectAdjoint", longest)
    programs = {alone: harness.build(*fns.pop(alone))}
    programs = harness.build_all(fns) | programs
    # Sorted by name: `diffrax` comes first at each length, and the others are compared with it.
    want = {}
    for (method, n), program in sorted(programs.items()):
        value, times = harness.clock(program.call, starts, 1 if method == "diffrax" else repeats)
        want.setdefault(n, value)
        difference = float(jnp.max(jnp.abs(value / want[n] - 1)))
        row = {"what": "gradient", "method": method, "N": n, "T": span(n), "difference": difference}
        yield row | program.times | times


def slope(num_steps: int, solver: dfx.AbstractSolver, adjoint: dfx.AbstractAdjoint) -> Callable:
    """A function from the parameters to the gradient."""
    t1 = span(num_steps)
    parallel = isinstance(solver, pdx.ParallelSolver)
    dt0, most = (t1, 1) if parallel else (t1 / num_steps, num_steps + 8)

    def loss(args):
        y0 = jnp.asarray(PROBLEM.y0)
        sol = dfx.diffeqsolve(PROBLEM.term, solver, 0.0, t1, dt0, y0, args, max_steps=most, adjoint=adjoint)
        assert sol.ys is not None
        return jnp.sum(sol.ys**2)

    return jax.grad(loss)


def summary(what: str, num_steps: int, found: list[dict]) -> dict:
    """The best time of each method, and the speed-up of the parallel solve over it."""
    best = {}
    for row in found:
        method = row["method"].split(",")[0]
        best[method] = min(row["median_ms"], best.get(method, np.inf))
        if method == "scan" and row["form"] == "vectors":
            best["scan, vectors"] = min(row["median_ms"], best.get("scan, vectors", np.inf))
    row = {"what": f"{what}, summary", "N": num_steps}
    row |= {f"{method} ms": time for method, time in best.items()}
    return row | {f"over {method}": time / best["parallel"] for method, time in best.items() if method != "parallel"}
