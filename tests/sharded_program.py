"""What `test_sharded.py` runs in processes of their own, since a number of devices is fixed when JAX starts.

    JAX_ENABLE_X64=1 XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.sharded_program CHECK,... [RANK PORT]

prints one JSON object of numbers for each check, by its name; the tests say what they must be.
"""

import functools
import itertools
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

from parallel_diffrax._recurrence import _policies
from parallel_diffrax._scan import DenseTransitions, kalman_smoother, solve_bidiagonal

from .test_linear_scan import loop, make


# As `problems.DRIVEN`, without an array of JAX before there are processes to put it.
ARGS = np.array([1.3, 0.1])
Y0 = np.array([1.0, 0.2])


def field(t, y, args, like=jnp):
    return like.stack([y[1], -args[0] * like.sin(y[0]) - args[1] * y[1] + 0.3 * like.cos(t)])


def in_sequence(num_steps, t1, y0=Y0, args=ARGS):
    """Heun's method, step by step in NumPy."""
    y, ts = y0, np.linspace(0.0, t1, num_steps + 1)
    for t, following in itertools.pairwise(ts):
        h, k = following - t, field(t, y, args, np)
        y = y + h / 2 * (k + field(following, y + h * k, args, np))
    return y


def final_state(num_steps, t1, scan, predictor=pdx.ConstantPredictor(), policy=pdx.policies.ParallelOnly()):
    """The end of a solve in one window, and its statistics, as a function of the initial state and the parameters."""
    root_finder = pdx.ParallelNewton(scan=scan)
    solver = pdx.ParallelSolver(dfx.Heun(), num_steps, root_finder=root_finder, predictor=predictor, policy=policy)

    def solve(y0, args):
        saveat, adjoint = dfx.SaveAt(t1=True, solver_state=True), dfx.DirectAdjoint()
        term = dfx.ODETerm(field)
        sol = dfx.diffeqsolve(term, solver, 0.0, t1, t1, y0, args, saveat=saveat, max_steps=1, adjoint=adjoint)
        return sol.ys[-1], pdx.statistics(sol)

    return solve


def difference(got, want) -> float:
    """The largest, relative to the size of the whole; NaN if there is one."""
    return float(np.max(np.abs(np.asarray(got) - want)) / max(1.0, np.max(np.abs(want))))


def collectives(compiled) -> list[tuple[str, int]]:
    """Every operation of a compiled program that communicates, and how many numbers its largest result has."""
    kinds = r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?"
    found = []
    for shapes, kind in re.findall(rf"= (.+?) {kinds}\(", compiled.as_text()):
        sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\w\[([\d,]*)\]", shapes)]
        found.append((kind, int(max(sizes))))
    return found


def scans():
    """Scans on eight devices against a loop."""
    scan, out = pdx.scans.ShardedScan(Mesh(jax.devices(), "time")), {}
    associative = pdx.scans.ShardedScan(scan.mesh, local=pdx.scans.AssociativeScan())
    cases = [(scan, n, 3, "dense") for n in (1, 5, 64)] + [(scan, 13, 4, kind) for kind in ("diagonal", "blocks")]
    for way, num_steps, size, kind in [*cases, (associative, 13, 2, "dense")]:
        transitions, r = make(num_steps, size, kind)
        both = jax.jit(lambda T, r, way=way: [way.solve(T, r, transpose=transpose) for transpose in (False, True)])
        for transpose, got in enumerate(both(transitions, r)):
            out[f"{kind} {num_steps} {transpose}"] = difference(got, loop(transitions.dense(), r, transpose))

    transitions, r = make(13, 2, "dense")
    damping = jnp.linspace(0.0, 1.0, 13)
    got, want = (
        jax.jit(functools.partial(kalman_smoother, scan=s))(transitions, r, damping)
        for s in (scan, pdx.scans.SequentialScan())
    )
    out["Kalman"] = difference(got, want)

    def loss(scan, A):
        return jnp.sum(jnp.sin(solve_bidiagonal(DenseTransitions(A), r, scan)))

    stack = jnp.stack([transitions.A, 0.5 * transitions.A])
    got, want = (
        jax.jit(jax.vmap(jax.grad(functools.partial(loss, s))))(stack) for s in (scan, pdx.scans.SequentialScan())
    )
    out["gradient of a batch"] = difference(got, want)

    # What is never read, and what is not finite.
    solve = jax.jit(scan.solve)
    poisoned = DenseTransitions(transitions.A.at[0].set(jnp.nan))
    out["first transition"] = difference(solve(poisoned, r), loop(transitions.A, r, False))
    finite = np.isfinite(solve(transitions, r.at[8, 0].set(jnp.nan)))
    return {"differences": out, "finite": finite.all(axis=1).tolist()}


def batch():
    """A batch over two devices, times three for time: a number at which all segments of the code are uneven."""
    mesh = jax.make_mesh((2, 3), ("batch", "time"), (AxisType.Auto, AxisType.Auto), devices=jax.devices()[:6])
    solve = final_state(1002, 6.0, pdx.scans.ShardedScan(mesh))

    def loss(y0, args):
        y1, _ = solve(y0, args)
        return jnp.sum(y1**2), y1

    y0 = Y0 * np.linspace(0.5, 1.5, 4)[:, None]
    spread = jax.device_put(y0, NamedSharding(mesh, PartitionSpec("batch")))
    program = jax.jit(jax.vmap(jax.grad(loss, (0, 1), has_aux=True), (0, None)))
    gradients, got = program(spread, ARGS)

    def slope(direction):
        """Of the loss of every member, along a direction of the initial state and the parameters: by a complex step."""
        step = 1e-30j * np.asarray(direction)
        ends = np.stack([in_sequence(1002, 6.0, y + step[:2], ARGS + step[2:]) for y in y0])
        return np.sum(ends**2, axis=1).imag / 1e-30

    return {
        "state": difference(got, np.stack([in_sequence(1002, 6.0, y) for y in y0])),
        "gradient": difference(np.concatenate(gradients, axis=1), np.stack([slope(e) for e in np.eye(4)], axis=1)),
        "shards": sorted({s.data.shape for s in got.addressable_shards}),
    }


def policy():
    """The default policy with a first guess too poor for the whole: cut in segments, which are short from here on."""
    _policies._LARGEST_SEGMENT = 512
    num_steps, t1 = 2**15, 100.0
    scan = pdx.scans.ShardedScan(Mesh(jax.devices(), "time"))
    solve = final_state(
        num_steps, t1, scan, pdx.CoarsePredictor(64, max_share=1 / 256), pdx.AdaptivePolicy(min_steps=32)
    )
    compiled = jax.jit(solve).lower(Y0, ARGS).compile()
    got, statistics = compiled(Y0, ARGS)
    return {
        "difference": difference(got, in_sequence(num_steps, t1)),
        "attempts": int(statistics.attempts),
        "collectives": collectives(compiled),
        "numbers": num_steps * Y0.size,
    }


def processes(rank, port):
    """The same program in each of two processes with two devices each, of a number of steps that four does not divide."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    solve = final_state(515, 6.0, pdx.scans.ShardedScan(Mesh(jax.devices(), "time")))
    got, _ = jax.jit(solve)(Y0, ARGS)
    return {
        "devices": len(jax.devices()),
        "own": len(jax.local_devices()),
        "difference": difference(got, in_sequence(515, 6.0)),
    }


if __name__ == "__main__":
    checks = {check.__name__: check for check in (scans, batch, policy, processes)}
    print(json.dumps({name: checks[name](*map(int, sys.argv[2:])) for name in sys.argv[1].split(",")}))
