"""FitzHugh-Nagumo over T = 400 by Tsit5 on a fixed grid: parallel in time against sequential, end to end.

    python -m benchmarks.first_light [--quick] [--out FOLDER]

Shows, in one process and for the same grid: `diffeqsolve` with `ParallelSolver(Tsit5())` against `diffeqsolve` with
`Tsit5()`, and against a plain `lax.scan` over the unrolled step; the gradient likewise; and that they agree. The run time
of sequential Diffrax at the larger sizes is extrapolated from the smaller, and marked so.
"""

import argparse
import pathlib
from collections.abc import Iterator

import diffrax as dfx
import jax
import jax.numpy as jnp

import parallel_diffrax as pdx

from . import harness


T = 400.0


def field(t, y, args):
    v, w = y
    current, rate = args
    return jnp.stack([v - v**3 / 3 - w + current, rate * (v + 0.7 - 0.8 * w)])


TERM = dfx.ODETerm(field)
ARGS = jnp.array([0.5, 0.08])


def parallel(num_steps):
    solver = pdx.ParallelSolver(dfx.Tsit5(), num_steps)

    def solve(y0, args=ARGS, saveat=dfx.SaveAt(t1=True), adjoint=dfx.RecursiveCheckpointAdjoint()):
        return dfx.diffeqsolve(TERM, solver, 0.0, T, T, y0, args, saveat=saveat, max_steps=1, adjoint=adjoint)

    return solve


def sequential(num_steps):
    def solve(y0, args=ARGS):
        return dfx.diffeqsolve(TERM, dfx.Tsit5(), 0.0, T, T / num_steps, y0, args, max_steps=num_steps + 8)

    return solve


def plain_scan(num_steps):
    """The hand-written baseline: one `lax.scan` over the unrolled tableau."""
    tableau = dfx.Tsit5.tableau
    ts = jnp.linspace(0.0, T, num_steps + 1)

    def step(y, times):
        t0, t1 = times
        h, ks = t1 - t0, [field(t0, y, ARGS)]
        for a, c in zip(tableau.a_lower, tableau.c):
            ks.append(field(t0 + c * h, y + h * sum(float(w) * k for w, k in zip(a, ks)), ARGS))
        return y + h * sum(float(w) * k for w, k in zip(tableau.b_sol[:-1], ks)), None

    return lambda y0: jax.lax.scan(step, y0, (ts[:-1], ts[1:]), unroll=4)[0]


def end_state(solve):
    return lambda y0: solve(y0).ys


def inputs(count):
    return [jnp.array([-1.0, 1.0]) + 0.01 * k for k in range(count)]


def compare_forward(sizes, reference_size, repeats) -> list[dict]:
    rows = []
    reference = harness.measure(jax.jit(end_state(sequential(reference_size))), inputs(2), min(repeats, 3))
    per_step = reference["median_ms"] / reference_size
    for n in sizes:
        ours = harness.measure(jax.jit(end_state(parallel(n))), inputs(4), repeats)
        scan = harness.measure(jax.jit(plain_scan(n)), inputs(2), min(repeats, 5))
        sol = parallel(n)(inputs(1)[0], saveat=dfx.SaveAt(t1=True, solver_state=True))
        exact = plain_scan(n)(inputs(1)[0])
        stats = sol.solver_state
        assert stats is not None and sol.ys is not None
        rows.append(
            {
                "what": "solve",
                "N": n,
                "parallel_ms": ours["median_ms"],
                "compile_s": ours["compile_s"],
                "scan_ms": scan["median_ms"],
                "diffrax_ms": per_step * n,
                "extrapolated": n != reference_size,
                "speedup": per_step * n / ours["median_ms"],
                "speedup_scan": scan["median_ms"] / ours["median_ms"],
                "iterations": int(stats.iterations),
                "sequential_steps": int(stats.sequential_steps),
                "predictor_steps": int(stats.predictor_steps),
                "difference": float(jnp.max(jnp.abs(sol.ys[-1] - exact) / (1 + jnp.abs(exact)))),
                "detail": {"parallel": ours, "diffrax": reference, "scan": scan},
            }
        )
    return rows


def compare_gradient(n, repeats) -> list[dict]:
    def loss(solve, **options):
        return lambda args: jnp.sum(solve(inputs(1)[0], args, **options).ys ** 2)

    arguments = [ARGS * (1 + 0.01 * k) for k in range(4)]
    theirs = jax.jit(jax.grad(loss(sequential(n))))
    slow = harness.measure(theirs, arguments, min(repeats, 3))
    want, rows = theirs(ARGS), []
    for adjoint in (dfx.RecursiveCheckpointAdjoint(), dfx.DirectAdjoint()):
        ours = jax.jit(jax.grad(loss(parallel(n), adjoint=adjoint)))
        fast = harness.measure(ours, arguments, repeats)
        rows.append(
            {
                "what": f"gradient, {type(adjoint).__name__}",
                "N": n,
                "parallel_ms": fast["median_ms"],
                "compile_s": fast["compile_s"],
                "diffrax_ms": slow["median_ms"],
                "extrapolated": False,
                "speedup": slow["median_ms"] / fast["median_ms"],
                "difference": float(jnp.max(jnp.abs(ours(ARGS) - want) / jnp.abs(want))),
                "detail": {"parallel": fast, "diffrax": slow},
            }
        )
    return rows


def rows(quick: bool) -> Iterator[dict]:
    """The rows of this part."""
    sizes, reference, gradient, repeats = ([16384, 262144], 16384, 4096, 21)
    if quick:
        sizes, reference, gradient, repeats = ([1024, 4096], 4096, 1024, 5)
    yield from compare_forward(sizes, reference, repeats)
    yield from compare_gradient(gradient, repeats)


def main():
    parser = argparse.ArgumentParser(description="FitzHugh-Nagumo, parallel against sequential.")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a machine without a GPU")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder of the JSON file")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    global ARGS
    ARGS = jnp.asarray(ARGS, jnp.float64)

    found = list(rows(options.quick))
    path = harness.write(harness.result_name("first_light"), found, options.out)
    print(jax.devices()[0].device_kind, path)
    columns = [
        "what",
        "N",
        "parallel_ms",
        "scan_ms",
        "diffrax_ms",
        "extrapolated",
        "speedup",
        "iterations",
        "predictor_steps",
        "sequential_steps",
        "difference",
        "compile_s",
    ]
    print(harness.table(found, columns))


if __name__ == "__main__":
    main()
