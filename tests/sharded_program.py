"""What `test_sharded.py` runs in processes of their own, since a number of devices is fixed when JAX starts.

    JAX_ENABLE_X64=1 XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.sharded_program CHECK [RANK PORT]

prints one JSON object of numbers; the tests say what they must be.
"""

import functools
import json
import re
import sys

import jax
import jaxtyping
import numpy as np


with jaxtyping.install_import_hook("parallel_diffrax", "beartype.beartype"):
    import parallel_diffrax as pdx

import diffrax as dfx
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from parallel_diffrax._recurrence._fallback import _lyapunov
from parallel_diffrax._scan import DenseTransitions, kalman_filter, kalman_smoother, solve_bidiagonal

from .problems import DRIVEN, driven, DRIVEN_ARGS, DRIVEN_Y0, relative_difference
from .test_linear_scan import make


def solver_of(num_steps, scan, predictor, fallback):
    return pdx.ParallelSolver(
        dfx.Heun(), num_steps, root_finder=pdx.ParallelNewton(scan=scan), predictor=predictor, fallback=fallback
    )


def final_state(num_steps, scan, t1=6.0):
    """The end of a solve in one window, as a function of the initial state and the parameters."""
    solver = solver_of(num_steps, scan, pdx.ConstantPredictor(), pdx.NoFallback())

    def solve(y0, args):
        adjoint = dfx.DirectAdjoint()
        return dfx.diffeqsolve(DRIVEN, solver, 0.0, t1, t1, y0, args, max_steps=1, adjoint=adjoint).ys[-1]

    return solve


def value_and_gradient(num_steps, scan):
    """The final state, and the gradient of a loss on it, by one program."""
    solve = final_state(num_steps, scan)

    def loss(parameters):
        y1 = solve(*parameters)
        return jnp.sum(y1**2), y1

    return jax.jit(jax.grad(loss, has_aux=True))


def collectives(compiled) -> list[tuple[str, int]]:
    """Every operation of a compiled program that communicates, and how many numbers its largest result has."""
    kinds = r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?"
    found = []
    for shapes, kind in re.findall(rf"= (.+?) {kinds}\(", compiled.as_text()):
        sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\w\[([\d,]*)\]", shapes)]
        found.append((kind, int(max(sizes))))
    return found


def scans():
    """Differences between scans on eight devices and on one, relative to the size of the solution."""
    scan, plain, out = pdx.ShardedScan(Mesh(jax.devices(), "time")), pdx.SequentialScan(), {}
    associative = pdx.ShardedScan(scan.mesh, local=pdx.AssociativeScan())
    cases = [(n, 3, "dense") for n in (1, 5, 13, 64)] + [(13, 4, kind) for kind in ("diagonal", "blocks", "scalar")]

    def difference(got, want):
        return float(np.max(np.abs(np.asarray(got) - want)) / max(1.0, np.max(np.abs(want))))

    for num_steps, size, kind in cases:
        transitions, r = make(num_steps, size, kind)
        for transpose in (False, True):
            want = np.asarray(plain.solve(transitions, r, transpose=transpose))
            for name, way in [("", scan), ("associative ", associative)][: 2 if num_steps == 13 else 1]:
                got = jax.jit(way.solve, static_argnames="transpose")(transitions, r, transpose=transpose)
                out[f"{name}{kind} {num_steps} {transpose}"] = difference(got, want)
    transitions, r = make(13, 2, "dense")
    damping = jnp.linspace(0.0, 1.0, 13)
    for estimate in (kalman_filter, kalman_smoother):
        got, want = (jax.jit(functools.partial(estimate, scan=s))(transitions, r, damping) for s in (scan, plain))
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want))
        out[estimate.__name__] = max(difference(a, np.asarray(b)) for a, b in pairs)

    def loss(A, scan):
        return jnp.sum(jnp.sin(solve_bidiagonal(DenseTransitions(A), r, scan)))

    stack = jnp.stack([transitions.A, 0.5 * transitions.A])
    got, want = (jax.jit(jax.vmap(jax.grad(lambda A, s=s: loss(A, s))))(stack) for s in (scan, plain))
    out["gradient of a batch"] = difference(got, want)

    poisoned = DenseTransitions(transitions.A.at[0].set(jnp.nan))
    solve = jax.jit(scan.solve)
    out["first transition"] = difference(solve(poisoned, r), np.asarray(plain.solve(transitions, r)))
    finite = np.isfinite(solve(transitions, r.at[8, 0].set(jnp.nan)))
    return {"differences": out, "finite": finite.all(axis=1).tolist()}


def solver():
    """A solve and its gradient, on a number of devices that is not the best: all stretches of the code are uneven then."""
    parameters = (DRIVEN_Y0, DRIVEN_ARGS)
    mesh = jax.make_mesh((6,), ("time",), devices=jax.devices()[:6])
    got = value_and_gradient(1002, pdx.ShardedScan(mesh))(parameters)
    want = value_and_gradient(1002, pdx.AutoScan())(parameters)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want))
    return {"differences": [relative_difference(a, b) for a, b in pairs]}


def batch():
    """A batch over two devices, times four for time."""
    mesh = jax.make_mesh((2, 4), ("batch", "time"), axis_types=(AxisType.Auto, AxisType.Auto))
    y0 = DRIVEN_Y0 * jnp.linspace(0.5, 1.5, 6)[:, None]
    spread = jax.device_put(y0, NamedSharding(mesh, PartitionSpec("batch")))
    compiled = (
        jax.jit(jax.vmap(final_state(512, pdx.ShardedScan(mesh)), (0, None))).lower(spread, DRIVEN_ARGS).compile()
    )
    got = compiled(spread, DRIVEN_ARGS)
    want = jax.vmap(final_state(512, pdx.AutoScan()), (0, None))(y0, DRIVEN_ARGS)
    return {
        "difference": relative_difference(got, want),
        "shards": sorted({s.data.shape for s in got.addressable_shards}),
    }


def policy():
    """The default policy with a first guess too poor for the whole: cut in stretches, which are short for this test."""
    _lyapunov._LARGEST_STRETCH = 512
    num_steps, t1 = 2**15, 100.0
    scan = pdx.ShardedScan(Mesh(jax.devices(), "time"))
    solver = solver_of(num_steps, scan, pdx.CoarsePredictor(64, max_share=1 / 256), pdx.LyapunovFallback(min_steps=32))

    @jax.jit
    def solve(y0):
        saveat = dfx.SaveAt(t1=True, solver_state=True)
        return dfx.diffeqsolve(DRIVEN, solver, 0.0, t1, t1, y0, DRIVEN_ARGS, saveat=saveat, max_steps=1)

    ts = jnp.linspace(0.0, t1, num_steps + 1)

    def step(y, times):
        h = times[1] - times[0]
        k = driven(times[0], y, DRIVEN_ARGS)
        return y + h / 2 * (k + driven(times[1], y + h * k, DRIVEN_ARGS)), None

    compiled = solve.lower(DRIVEN_Y0).compile()
    sol = compiled(DRIVEN_Y0)
    want = jax.jit(lambda y0: jax.lax.scan(step, y0, (ts[:-1], ts[1:]))[0])(DRIVEN_Y0)
    return {
        "difference": relative_difference(sol.ys[-1], want),
        "attempts": int(sol.solver_state.attempts),
        "collectives": collectives(compiled),
        "numbers": num_steps * DRIVEN_Y0.size,
    }


def processes(rank, port):
    """The same program in each of two processes, with two devices each."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    mesh = Mesh(jax.devices(), "time")
    parameters = (np.asarray(DRIVEN_Y0), np.asarray(DRIVEN_ARGS))
    got = value_and_gradient(515, pdx.ShardedScan(mesh))(parameters)
    want = value_and_gradient(515, pdx.AutoScan())(parameters)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want))
    differences = [relative_difference(a, b) for a, b in pairs]
    return {"devices": len(jax.devices()), "own": len(jax.local_devices()), "differences": differences}


if __name__ == "__main__":
    checks = {check.__name__: check for check in (scans, solver, batch, policy, processes)}
    print(json.dumps(checks[sys.argv[1]](*map(int, sys.argv[2:]))))
