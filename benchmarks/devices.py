"""Several devices against one: an affine scan alone, a whole solve, and its gradient.

    python -m benchmarks.devices [--quick] [--only scan solve gradient] [--counts 1 2 4] [--out FOLDER]

The problem is two coupled FitzHugh-Nagumo oscillators (`D = 4`) over T = 400 by Tsit5 in one window of 2^24 steps, with the
default policy, in float64. The solve goes through `diffeqsolve` with `ParallelSolver`. One device uses the default scan,
several use `ShardedScan`. Differences are against one device, relative to one plus the size. On a CPU, run it with
`XLA_FLAGS=--xla_force_host_platform_device_count=8`. That shows that it runs, but says nothing about speed.
"""

import argparse
import math
import pathlib
from collections.abc import Iterator

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import parallel_diffrax as pdx
from parallel_diffrax._scan import AbstractScan, DenseTransitions

from . import harness


SIZE = 4
T = 400.0


def field(t, y, args):
    v, w = y[:2], y[2:]
    current, rate, coupling = args
    return jnp.concatenate([v - v**3 / 3 - w + current + coupling * (v[::-1] - v), rate * (v + 0.7 - 0.8 * w)])


def scan_over(mesh: Mesh) -> AbstractScan:
    """The default scan for one device, `ShardedScan` for several."""
    return pdx.scans.AutoScan() if mesh.size == 1 else pdx.scans.ShardedScan(mesh)


def affine_scan(num_steps, mesh):
    """A program that solves an affine recurrence, and inputs that are created sharded over the mesh."""
    spread = NamedSharding(mesh, PartitionSpec("time"))

    @jax.jit(out_shardings=(spread, [spread, spread]))
    def make():
        matrices, vectors = jax.random.split(jax.random.key(0))
        A = 0.3 * jax.random.normal(matrices, (num_steps, SIZE, SIZE))
        r = jax.random.normal(vectors, (num_steps, SIZE))
        return A, [r, 2 * r]

    A, right_hand_sides = make()
    scan = scan_over(mesh)
    return jax.jit(lambda A_r: scan.solve(DenseTransitions(A_r[0]), A_r[1])), [(A, r) for r in right_hand_sides]


def solver_over(num_steps, mesh):
    root_finder = pdx.ParallelNewton(scan=scan_over(mesh))
    # Every device holds all coarse states. By default they may be a quarter of 2^24, so the share is limited here.
    share = min(0.25, 2**16 / num_steps)
    return pdx.ParallelSolver(
        dfx.Tsit5(),
        num_steps,
        root_finder=root_finder,
        predictor=pdx.CoarsePredictor(max_share=share),
        policy=pdx.AdaptivePolicy(),
    )


def solve(num_steps, mesh):
    """A program that returns the final state and the statistics, and its inputs."""
    solver = solver_over(num_steps, mesh)

    def program(args):
        y0 = jnp.array([-1.0, 0.5, 1.0, 0.3])
        saveat, adjoint = dfx.SaveAt(t1=True, solver_state=True), dfx.DirectAdjoint()
        term = dfx.ODETerm(field)
        sol = dfx.diffeqsolve(term, solver, 0.0, T, T, y0, args, saveat=saveat, max_steps=1, adjoint=adjoint)
        assert sol.ys is not None
        return sol.ys[-1], pdx.statistics(sol)

    return jax.jit(program), parameters()


def gradient(num_steps, mesh):
    program, inputs = solve(num_steps, mesh)
    return jax.jit(jax.grad(lambda args: jnp.sum(program(args)[0] ** 2))), inputs


def parameters():
    return [jnp.array([0.5, 0.08, 0.05]) * (1 + 0.01 * k) for k in range(4)]


PROGRAMS = {"scan": affine_scan, "solve": solve, "gradient": gradient}


def compare(what, num_steps, counts, repeats) -> Iterator[dict]:
    """Yields one row for each number of devices."""
    alone, reference = math.nan, None
    for count in counts:
        mesh, values = Mesh(jax.devices()[:count], "time"), []
        program, inputs = PROGRAMS[what](num_steps, mesh)
        detail = harness.measure(program, inputs, repeats, values)
        value, statistics = values[0] if what == "solve" else (values[0], None)
        value = np.asarray(value)
        if count == 1:
            alone, reference = detail["median_ms"], value
        row = {"what": what, "N": num_steps, "D": SIZE, "devices": count, "ms": detail["median_ms"]}
        row |= {"speedup": alone / detail["median_ms"], "compile_s": detail["compile_s"], "detail": detail}
        if reference is not None:
            row["difference"] = float(np.max(np.abs(value - reference) / (1 + np.abs(reference))))
        if statistics is not None:
            row |= {name: int(getattr(statistics, name)) for name in ("attempts", "iterations", "sequential_steps")}
        yield row
        del program, inputs, values, value


def rows(quick: bool, only=tuple(PROGRAMS), counts=None) -> Iterator[dict]:
    """Yields the rows of this part."""
    available = jax.device_count()
    counts = counts or sorted({count for count in (1, 2, 4, available) if count <= available})
    num_steps, repeats = (2**14, 3) if quick else (2**24, 11)
    for what in only:
        yield from compare(what, num_steps, counts, repeats)


COLUMNS = ["what", "N", "devices", "ms", "speedup", "attempts", "iterations", "sequential_steps", "difference"]
COLUMNS += ["compile_s"]


def main():
    parser = argparse.ArgumentParser(description="Several devices against one.")
    parser.add_argument("--quick", action="store_true", help="2^14 steps, for a machine without a GPU")
    parser.add_argument("--only", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS), help="what to measure")
    parser.add_argument("--counts", nargs="+", type=int, default=None, help="numbers of devices; the first should be 1")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder of the JSON file")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    done, name = [], harness.result_name("devices")
    for row in rows(options.quick, options.only, options.counts):
        done.append(row)
        path = harness.write(name, done, options.out, quick=options.quick, complete=False)
        print(harness.table([row], COLUMNS), flush=True)
    path = harness.write(name, done, options.out, quick=options.quick, complete=True)
    print(jax.devices()[0].device_kind, path)
    print(harness.table(done, COLUMNS))


if __name__ == "__main__":
    main()
