"""The backends of kernels beside each other and beside XLA: the time of a call, of steps in sequence, of scans, to compile,
and of calls from inside other programs.

Every row names its backend: `mosaic`, `warp`, or `off` for XLA.

- `call`: one step of one member.
- `steps`: 512 steps of FitzHugh-Nagumo by Tsit5 in float64, with all states as outputs, of a batch of members.
- `scan`: an affine recurrence of `N` steps of `D x D` matrices.
- `compile`: the time from tracing the steps of 1024 members to the end of the first call, in a process of its own, without
  and with what the backend keeps on disk.
- `inside`: the steps of 32 members, ten times in a `lax.while_loop`, and once under `shard_map`.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import diffrax as dfx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np

import parallel_diffrax as pdx
from parallel_diffrax._recurrence._stepper import step_through, Stepper
from parallel_diffrax._scan import DenseTransitions

from . import harness
from .batch import members, PROBLEM, STEP, TIMED


VARIABLE = "PARALLEL_DIFFRAX_KERNELS"
BACKENDS = ("mosaic", "warp", "off")


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part. Backends that this device does not run fail in rows of their own."""
    for name in BACKENDS:
        with_backend = functools.partial(in_backend, name)
        yield with_backend({"kind": "call", "members": 1, "N": 1}, lambda: steps_row(1, 1, 200))
        for batch in (1, 16) if quick else (1, 32, 1024, 32768, 524288):
            row = {"kind": "steps", "members": batch, "N": TIMED}
            yield with_backend(row, lambda batch=batch: steps_row(batch, TIMED, 10 if batch > 40000 else 30))
        for size, length in ((2, 4096),) if quick else ((2, 2**20), (4, 2**20), (16, 2**17), (2, 16384), (16, 2048)):
            for dtype in (np.float32, np.float64):
                row = {"kind": "scan", "D": size, "N": length, "dtype": np.dtype(dtype).name}
                yield with_backend(row, lambda size=size, length=length, dtype=dtype: scan_row(size, length, dtype))
        for way in ("while_loop", "shard_map"):
            yield with_backend(
                {"kind": "inside", "way": way, "members": 32, "N": TIMED}, lambda way=way: inside_row(way)
            )
    for name in BACKENDS:
        with tempfile.TemporaryDirectory() as cache:
            for kept in (False, True):
                yield {"kind": "compile", "backend": name, "kept": kept} | compile_row(name, cache)


def in_backend(name: str, row: dict, measure) -> dict:
    """A row measured with one backend."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    jax.clear_caches()
    try:
        return row | {"backend": name} | measure()
    except Exception as error:  # the other rows can still be measured
        return row | {"backend": name, "failed": f"{type(error).__name__}: {error}"[:300]}
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def step(y, t):
    """A step of Tsit5 with its tableau unrolled."""
    tableau = dfx.Tsit5.tableau
    combine = lambda weights, slopes: sum(float(w) * k for w, k in zip(weights, slopes) if w != 0)
    slopes = [PROBLEM.field(t, y, PROBLEM.args)]
    for weights, c in zip(tableau.a_lower, tableau.c):
        slopes.append(PROBLEM.field(t + float(c) * STEP, y + STEP * combine(weights, slopes), PROBLEM.args))
    return y + STEP * combine(tableau.b_sol, slopes)


def steps(num_steps: int):
    """All states of the steps from an initial state."""
    ts = jnp.arange(num_steps) * STEP

    def run(y0):
        stepper = Stepper(step, y0, ts[0], num_steps)
        if os.environ[VARIABLE] == "off":
            return step_through(stepper.step, stepper.scalar, y0, ts, num_steps)
        if stepper.kernel is None:
            raise RuntimeError("this device runs no kernels by this backend")
        return stepper(y0, ts, num_steps).states

    return run


def steps_row(batch: int, num_steps: int, repeats: int) -> dict:
    starts = members(batch, 2)
    program = harness.build(jax.vmap(steps(num_steps)), starts[0])
    y, times = harness.clock(program.call, starts, repeats)
    return times | program.times | {"sum": float(jnp.sum(y[:, -1]))}


def scan_row(size: int, length: int, dtype) -> dict:
    rng = np.random.default_rng(0)
    A = (0.7 * rng.normal(size=(length, size, size)) / np.sqrt(size)).astype(dtype)
    inputs = [(jnp.asarray(A), jnp.asarray(rng.normal(size=(length, size)).astype(dtype))) for _ in range(2)]
    solve = lambda pair: pdx.scans.AutoScan().solve(DenseTransitions(pair[0]), pair[1])
    program = harness.build(solve, inputs[0])
    d, times = harness.clock(program.call, inputs, 20)
    return times | program.times | {"sum": float(jnp.sum(d[-1]))}


def inside_row(way: str) -> dict:
    starts, run = members(32, 2), jax.vmap(steps(TIMED))
    if way == "while_loop":

        def program(y0):
            body = lambda carry: (carry[0] + 1, run(carry[1])[:, -1])
            return lax.while_loop(lambda carry: carry[0] < 10, body, (jnp.array(0), y0))[1]

    else:
        mesh = jax.sharding.Mesh(np.array(jax.devices()), "members")
        spec = jax.sharding.PartitionSpec("members")
        program = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    built = harness.build(program, starts[0])
    _, times = harness.clock(built.call, starts, 20)
    return times | built.times


def compile_row(name: str, cache: str) -> dict:
    """The times of a process of its own. Warp keeps what it compiles in `cache`; Mosaic and XLA keep nothing."""
    environment = os.environ | {VARIABLE: name, "WARP_CACHE_PATH": cache}
    command = [sys.executable, "-c", "from benchmarks import kernels; kernels.compile_once()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        return {"failed": done.stderr[-300:]}
    return json.loads(done.stdout.splitlines()[-1])


def compile_once():
    """Prints the times of the first and the second compilation of a process. The first includes the tests at first use."""
    jax.config.update("jax_enable_x64", True)
    found = {}
    jax.block_until_ready(jax.jit(lambda x: 2 * x)(jnp.ones(3)))
    for label, batch in (("first_s", 1024), ("next_s", 1056)):
        y0 = members(batch, 1)[0]
        start = time.perf_counter()
        jax.block_until_ready(jax.jit(jax.vmap(steps(TIMED)))(y0))
        found[label] = time.perf_counter() - start
    print(json.dumps(found))
