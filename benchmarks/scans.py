"""Scans of affine maps against the bandwidth floor.

The recurrence is `d[i] = A[i] d[i-1] + r[i]` in float32, with full matrices. The floor is the time to read `A` and `r` once
and to write `d` once, at the bandwidth that copying a large array reaches on the same device. Every scan of
`parallel_diffrax._scan` that needs no arguments is measured, so that a new scan is included without a change here. For the
others, the row gives the reason why they are left out.

`median_ms` is the time of one call, including the wait for its result. `scan_ms` is the time of one scan among 50 in one
program, where the result of each is the right-hand side of the next. It hides the host's work for a call, and the launch of
a kernel unless that takes longer than the kernel. `over_floor` is the ratio of `scan_ms` to the floor.
"""

import inspect
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from parallel_diffrax import _scan

from . import harness


# Beyond this number of steps, a sequential scan is extrapolated on an accelerator, where each step is a kernel launch.
_LONGEST_SEQUENTIAL = 2**14
# Number of scans in one program, for `scan_ms`.
_CHAIN = 50


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    cases = [(2, 2**12), (16, 2**9)] if quick else [(2, 2**20), (4, 2**20), (16, 2**17)]
    bandwidth = copy_bandwidth(2**22 if quick else 2**28)
    yield {"what": "copy", "GB_per_s": bandwidth / 1e9}
    for size, num_steps in cases:
        seen = {}
        for name, scan in choices().items():
            row = {"what": "scan", "scan": name, "D": size, "N": num_steps, "dtype": "float32"}
            if isinstance(scan, str):
                yield row | {"left_out": scan}
                continue
            count = num_steps
            if isinstance(scan, _scan.SequentialScan) and jax.default_backend() != "cpu":
                count = min(num_steps, _LONGEST_SEQUENTIAL)
            try:
                text = jax.jit(solver(scan)).lower(*elements(size, count, 0)).as_text()
                if text not in seen:
                    seen[text] = name, timed(scan, size, count, num_steps, bandwidth)
            except NotImplementedError as error:
                yield row | {"left_out": str(error)[:300]}
                continue
            except Exception as error:  # of any kind: a scan that fails on this case must not hide the others
                yield row | {"failed": repr(error)[:300]}
                continue
            first, measured = seen[text]
            yield row | {"same_program_as": None if first == name else first} | measured


def choices() -> dict[str, _scan.AbstractScan | str]:
    """Every scan that a user can choose, by name; or the reason why it cannot be measured."""
    found = {}
    for name, kind in sorted(vars(_scan).items()):
        if not inspect.isclass(kind) or not issubclass(kind, _scan.AbstractScan) or inspect.isabstract(kind):
            continue
        needed = [
            parameter.name
            for parameter in inspect.signature(kind).parameters.values()
            if parameter.default is parameter.empty
        ]
        found[name] = f"needs {', '.join(needed)}" if needed else kind()
    return found


def elements(size: int, num_steps: int, seed: int):
    """Contracting matrices and a right-hand side."""
    keys = jax.random.split(jax.random.key(seed))
    A = 0.4 / size**0.5 * jax.random.normal(keys[0], (num_steps, size, size), jnp.float32)
    return A, jax.random.normal(keys[1], (num_steps, size), jnp.float32)


def solver(scan: _scan.AbstractScan):
    """The scan as a function of arrays."""

    def solve(A, r):
        return scan.solve(_scan.DenseTransitions(A), r)

    return solve


def chained(scan: _scan.AbstractScan):
    """`_CHAIN` scans with the same matrices, one after another."""

    def body(_, A_r):
        # Without this barrier XLA would hoist the products of matrices out of the loop.
        A, r = jax.lax.optimization_barrier(A_r)
        return A, solver(scan)(A, r)

    return lambda A, r: jax.lax.fori_loop(0, _CHAIN, body, (A, r))[1]


def timed(scan: _scan.AbstractScan, size: int, count: int, num_steps: int, bandwidth: float) -> dict:
    """Times of one scan over `count` steps, scaled to `num_steps`, and its difference from the sequential scan."""
    inputs = [elements(size, count, k) for k in range(2)]
    program = harness.build(lambda pair: solver(scan)(*pair), inputs[0])
    d, times = harness.clock(program.call, inputs, 7)
    in_row = times["median_ms"]
    if in_row < 20:
        chain = harness.build(lambda pair: chained(scan)(*pair), inputs[0])
        in_row = harness.clock(chain.call, inputs, 7)[1]["median_ms"] / _CHAIN
    A, r = inputs[0]
    exact = jax.jit(solver(_scan.SequentialScan()))(A[:_LONGEST_SEQUENTIAL], r[:_LONGEST_SEQUENTIAL])
    difference = float(jnp.max(jnp.abs(d[:_LONGEST_SEQUENTIAL] - exact)) / jnp.max(jnp.abs(exact)))
    factor = num_steps / count
    floor = 1e3 * 4 * num_steps * (size**2 + 2 * size) / bandwidth
    times = {name: factor * times[name] for name in ("median_ms", "min_ms", "max_ms")}
    row = {"scan_ms": factor * in_row, "floor_ms": floor, "over_floor": factor * in_row / floor}
    return row | times | program.times | {"extrapolated": factor > 1, "difference": difference}


def copy_bandwidth(size: int) -> float:
    """Bytes read and written per second while an array of `size` float32 numbers is multiplied by a constant."""
    inputs = [jnp.full(size, float(k), jnp.float32) for k in range(2)]
    program = harness.build(lambda x: 1.5 * x, inputs[0])
    jax.block_until_ready(program.call(inputs[0]))
    best = float("inf")
    for _ in range(3):
        # Many calls in a row with one wait: each launch hides behind the work of the call before.
        start, out = time.perf_counter(), None
        for k in range(20):
            out = program.call(inputs[k % 2])
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / 20)
    return 2 * 4 * size / best
