"""Chaotic systems under `AdaptivePolicy`: exponents, iterations, and time against sequential Diffrax.

    python -m benchmarks.chaos [--only exponents|flows|speed] [--jobs K] [--out FOLDER]

- `exponents`: largest Lyapunov exponents against references from the literature. The same products are evaluated in
  parallel and sequentially. One case runs in float32 over 10^6 steps.
- `flows`: the nine flows of arXiv 2508.16817, table 1, under Euler's method. Iterations with the default predictor and from
  a constant guess, with the policy and without it. The method of that table needs 697 to 30000 iterations.
- `speed`: a whole solve under `AdaptivePolicy`, against sequential Diffrax and against the library's own sequential
  steps. The case `unstable` shows the cost of a wrong decision. Meant for a GPU.
"""

import argparse
import concurrent.futures
import functools as ft
import multiprocessing
import pathlib
import time
from collections.abc import Callable, Iterator

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

import parallel_diffrax as pdx

from . import harness
from .flows import Flow, linear, lorenz63, lorenz96, NINE_FLOWS, pendulum, roessler, thomas, van_der_pol


SEQUENTIAL = pdx.policies.Sequential()
STATISTICS = dfx.SaveAt(t1=True, solver_state=True)


# Name: flow, time span, number of steps, number of exponents.
EXPONENTS = {
    "Lorenz-63": (Flow(lorenz63, np.ones(3), 0.9056), 5000.0, 500_000, 3),
    "Roessler": (Flow(roessler, np.ones(3), 0.0714), 4000.0, 80_000, 3),
    "Lorenz-96, D = 40": (Flow(lorenz96, 8 + 0.1 * np.sin(np.arange(40.0) ** 2), 1.67), 200.0, 8000, 0),
    "Thomas, b = 0.208": (
        Flow(ft.partial(thomas, damping=0.208, strength=1.0), np.array([1.0, 1.2, 0.9])),
        2e4,
        10**5,
        0,
    ),
    "Thomas, b = 0.18": (
        Flow(ft.partial(thomas, damping=0.18, strength=1.0), np.array([1.0, 1.2, 0.9])),
        2e4,
        10**5,
        0,
    ),
    "damped pendulum": (Flow(pendulum, np.array([1.0, 0.0]), -0.15), 400.0, 16_000, 2),
    "linear": (Flow(linear, np.ones(3), -0.5), 100.0, 4000, 3),
    "van der Pol": (Flow(van_der_pol, np.array([2.0, 0.0]), 0.0), 400.0, 16_000, 2),
}


def henon(y, x):
    del x
    return (jnp.stack([1 - 1.4 * y[0] ** 2 + y[1], 0.3 * y[0]]),) * 2


def exponents(name: str) -> list[dict]:
    """The exponents of one system, by the parallel and the sequential evaluation."""
    estimates, start = [], time.perf_counter()
    for scan in (pdx.scans.AssociativeScan(), pdx.scans.SequentialScan()):
        if name == "Henon map":
            run = lambda scan=scan: pdx.diagnostics.scan_lyapunov_exponent(
                henon, jnp.array([0.1, 0.1]), None, 10**5, num_exponents=2, scan=scan, policy=SEQUENTIAL
            )
            reference, num_steps, span = 0.4192, 10**5, 1e5
        elif name == "Lorenz-63, float32, 10^6 steps":
            flow, num_steps, span, reference = Flow(lorenz63, np.ones(3)), 10**6, 1e4, 0.9056
            y0 = jnp.asarray(flow.y0, jnp.float32)
            run = lambda scan=scan, y0=y0, flow=flow: pdx.lyapunov_exponent(
                flow.term, dfx.Tsit5(), 0.0, 1e4, y0, num_steps=10**6, scan=scan, policy=SEQUENTIAL
            )
        else:
            flow, span, num_steps, count = EXPONENTS[name]
            reference = flow.exponent
            run = lambda scan=scan, flow=flow, span=span, num_steps=num_steps, count=count: pdx.lyapunov_exponent(
                flow.term, dfx.Tsit5(), 0.0, span, jnp.asarray(flow.y0), num_steps=num_steps, num_exponents=count,
                scan=scan, policy=SEQUENTIAL,
            )  # fmt: skip
        estimates.append(run())
    parallel, sequential = estimates
    return [
        {
            "what": "exponent",
            "problem": name,
            "T": span,
            "N": num_steps,
            "exponent": float(parallel.exponent),
            "reference": reference,
            "spectrum": None if parallel.spectrum is None else np.asarray(parallel.spectrum).tolist(),
            "parallel_minus_sequential": float(parallel.exponent - sequential.exponent),
            "finite": bool(jnp.all(jnp.isfinite(parallel.growth))),
            "seconds": time.perf_counter() - start,
        }
    ]


def flows(name: str, wanted: tuple[str, ...] | None = None) -> list[dict]:
    """Newton iterations on one of the nine flows, for the `wanted` variants of the solver, by default all."""
    flow, num_steps, span = NINE_FLOWS[name], 30_000, 300.0
    want = dfx.diffeqsolve(
        flow.term, dfx.Euler(), 0.0, span, span / num_steps, jnp.asarray(flow.y0), saveat=dfx.SaveAt(ts=[3.0]),
        max_steps=num_steps + 8,
    ).ys  # fmt: skip
    exponent = pdx.lyapunov_exponent(
        flow.term, dfx.Euler(), 0.0, span, jnp.asarray(flow.y0), num_steps=num_steps, policy=SEQUENTIAL
    ).exponent
    rows = []
    variants = {
        "policy": {},
        "policy, constant guess": {"predictor": pdx.ConstantPredictor()},
        "Newton alone, constant guess": {
            "predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly(), "root_find_max_steps": 3000
        },
    }  # fmt: skip
    for variant in variants if wanted is None else wanted:
        options = variants[variant]
        solver = pdx.ParallelSolver(dfx.Euler(), num_steps, **{"policy": pdx.AdaptivePolicy(), **options})
        saveat = dfx.SaveAt(ts=[3.0], solver_state=True)
        start = time.perf_counter()
        sol = dfx.diffeqsolve(
            flow.term, solver, 0.0, span, span, jnp.asarray(flow.y0), saveat=saveat, throw=False, max_steps=1
        )
        statistics = pdx.statistics(sol)
        assert sol.ys is not None and want is not None
        rows.append(
            {
                "what": "flow",
                "problem": name,
                "variant": variant,
                "exponent": float(exponent),
                "successful": bool(sol.result == dfx.RESULTS.successful),
                "iterations": int(statistics.iterations),
                "attempts": int(statistics.attempts),
                "sequential_steps": int(statistics.sequential_steps),
                "predictor_steps": int(statistics.predictor_steps),
                "residual": float(statistics.residual),
                "difference_at_t_3": float(jnp.max(jnp.abs(sol.ys - want) / (1 + jnp.abs(want)))),
                "seconds": time.perf_counter() - start,
            }
        )
    return rows


# Name: field, initial state, time span.
SPEED: dict[str, tuple[Callable, np.ndarray, float]] = {
    "Lorenz-63": (lorenz63, np.ones(3), 100.0),
    "Lorenz-96, D = 40": (lorenz96, 8 + 0.1 * np.sin(np.arange(40.0) ** 2), 50.0),
    # Perturbations grow by a factor e within 18 steps.
    "unstable": (lambda y: 60 * lorenz63(y), np.ones(3), 64.0),
}


def speed(name: str, num_steps: int, reference_steps: int, repeats: int) -> list[dict]:
    """Run times of one problem: `AdaptivePolicy`, all steps sequential, and Diffrax."""
    field, y0, span = SPEED[name]
    term = dfx.ODETerm(lambda t, y, args: field(y))
    starts = [jnp.asarray(y0 * (1 + 1e-3 * k)) for k in range(4)]
    check = span / 5

    def parallel(y0, policy, saveat=dfx.SaveAt(t1=True)):
        solver = pdx.ParallelSolver(dfx.Tsit5(), num_steps, policy=policy)
        return dfx.diffeqsolve(term, solver, 0.0, span, span, y0, saveat=saveat, throw=False, max_steps=1)

    def sequential(y0, count=reference_steps, saveat=dfx.SaveAt(t1=True)):
        t1 = span * count / num_steps
        return dfx.diffeqsolve(term, dfx.Tsit5(), 0.0, t1, span / num_steps, y0, saveat=saveat, max_steps=num_steps + 8)

    times = {
        label: harness.measure(jax.jit(lambda y0, f=policy: parallel(y0, f).ys), starts, repeats)
        for label, policy in {"policy": pdx.AdaptivePolicy(), "in sequence": SEQUENTIAL}.items()
    }
    times["diffrax"] = harness.measure(jax.jit(lambda y0: sequential(y0).ys), starts, min(repeats, 2))
    saveat = dfx.SaveAt(ts=jnp.array([check]), solver_state=True)
    sol = jax.jit(lambda y0: parallel(y0, pdx.AdaptivePolicy(), saveat))(starts[0])
    want = jax.jit(lambda y0: parallel(y0, SEQUENTIAL, dfx.SaveAt(ts=jnp.array([check]))))(starts[0]).ys
    statistics = pdx.statistics(sol)
    diffrax_ms = times["diffrax"]["median_ms"] * num_steps / reference_steps
    return [
        {
            "what": "speed",
            "problem": name,
            "N": num_steps,
            "policy_ms": times["policy"]["median_ms"],
            "in_sequence_ms": times["in sequence"]["median_ms"],
            "diffrax_ms": diffrax_ms,
            "extrapolated": reference_steps != num_steps,
            "speedup": diffrax_ms / times["policy"]["median_ms"],
            "against_own_sequence": times["policy"]["median_ms"] / times["in sequence"]["median_ms"],
            "compile_s": times["policy"]["compile_s"],
            "iterations": int(statistics.iterations),
            "attempts": int(statistics.attempts),
            "sequential_steps": int(statistics.sequential_steps),
            "predictor_steps": int(statistics.predictor_steps),
            "lyapunov": float(statistics.lyapunov),
            "residual": float(statistics.residual),
            "difference_at_a_fifth": float(jnp.max(jnp.abs(sol.ys - want) / (1 + jnp.abs(want)))),
            "detail": times,
        }
    ]


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part of `python -m benchmarks`: the speed comparison."""
    for name in list(SPEED)[:1] if quick else SPEED:
        yield from speed(name, *((1024, 1024, 3) if quick else (65536, 4096, 5)))


def run(part: str) -> list[dict]:
    """One system of `exponents` or `flows`, in a process of its own."""
    jax.config.update("jax_enable_x64", True)
    kind, name = part.split(": ", 1)
    return {"exponents": exponents, "flows": flows}[kind](name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["exponents", "flows", "speed"], help="one part")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes for exponents and flows")
    parser.add_argument("--num-steps", type=int, default=65536, help="N of the speed comparison")
    parser.add_argument("--reference-steps", type=int, default=None, help="steps of sequential Diffrax; default: N")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    if options.only in (None, "speed"):
        found = []
        for name in SPEED:
            found += speed(name, options.num_steps, options.reference_steps or options.num_steps, 5)
        harness.write(harness.result_name("chaos_speed"), found, options.out)
        columns = [
            "problem",
            "policy_ms",
            "in_sequence_ms",
            "diffrax_ms",
            "speedup",
            "against_own_sequence",
            "compile_s",
        ]
        columns += ["iterations", "attempts", "sequential_steps", "predictor_steps", "difference_at_a_fifth"]
        print(harness.table(found, columns))
    names = {"exponents": [*EXPONENTS, "Henon map", "Lorenz-63, float32, 10^6 steps"], "flows": list(NINE_FLOWS)}
    for kind in ("exponents", "flows"):
        if options.only in (None, kind):
            with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
                found = [row for part in pool.map(run, [f"{kind}: {name}" for name in names[kind]]) for row in part]
            harness.write(f"chaos_{kind}", found, options.out)
            columns = [
                "problem",
                "exponent",
                "reference",
                "parallel_minus_sequential",
                "finite",
                "variant",
                "successful",
            ]
            columns += ["iterations", "attempts", "sequential_steps", "predictor_steps", "difference_at_t_3"]
            print(harness.table(found, [c for c in columns if any(c in row for row in found)]))


if __name__ == "__main__":
    main()
