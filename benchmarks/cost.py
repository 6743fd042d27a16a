"""What steps cost on a GPU in sequence and in parallel, and the constants of `_recurrence/_cost.py` that fit it.

    python -m benchmarks --only cost

Rows `measured` are medians of whole solves in seconds: `in sequence`, for steps with few to many operations, in a kernel or
not, alone and in batches; `in parallel`, by multiple shooting and on all steps. Rows `fit` have the constants of the
formulas in that file by least squares of the relative errors. They are copied there by hand, rounded.
"""

import contextlib
from collections.abc import Iterator

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

import parallel_diffrax as pdx
from parallel_diffrax._recurrence import _cost, _driver

from . import harness
from .smooth_problems import FITZHUGH_NAGUMO, parallel, ring, Smooth


SEQUENTIAL = pdx.policies.Sequential()
DECAY = Smooth(lambda t, y, args: -y, np.ones(1), 100.0)
SORTED = Smooth(lambda t, y, args: -jnp.sort(y), np.ones(2), 100.0)


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    num_steps = 512 if quick else 16384
    steps = [(FITZHUGH_NAGUMO, dfx.Tsit5()), (ring(4), dfx.Tsit5()), (ring(8), dfx.Tsit5()), (DECAY, dfx.Euler())]
    steps += [(FITZHUGH_NAGUMO, dfx.Dopri8()), (FITZHUGH_NAGUMO, dfx.Bosh3())]
    found = []
    for problem, solver in steps:
        found.append(in_sequence(problem, solver, num_steps, 1))
        yield found[-1]
    for batch in (16,) if quick else (16384, 131072):
        yield in_sequence(FITZHUGH_NAGUMO, dfx.Tsit5(), 512, batch)
    yield in_sequence(SORTED, dfx.Euler(), 512, 1)
    kernels = [row for row in found if row["operations"] is not None]
    if len(kernels) >= 2:
        per_step = np.array([row["seconds"] / row["N"] for row in kernels])
        columns = np.array([[1.0, row["operations"]] for row in kernels]) / per_step[:, None]
        step, operation = np.linalg.lstsq(columns, np.ones(len(kernels)), rcond=None)[0]
        yield {"what": "fit", "_KERNEL_STEP": step, "_KERNEL_OPERATION": operation}
    for intervals in (True, False):
        solves = []
        for size in (2, 8) if quick else (2, 4, 8):
            for n in (4096,) if quick else (4096, 16384, 262144, 2**20):
                if size == 8 and n == 2**20 and not intervals:
                    continue
                solves.append(in_parallel(ring(size) if size > 2 else FITZHUGH_NAGUMO, n, size, intervals))
                yield solves[-1]
        columns = np.array([[1.0, row["N"] * row["D"] ** 2] for row in solves])
        times = np.array([row["seconds"] for row in solves])
        constant, entry = np.linalg.lstsq(columns / times[:, None], np.ones(len(times)), rcond=None)[0]
        names = ("_SHOOTING", "_SHOOTING_ENTRY") if intervals else ("_SOLVE", "_ENTRY")
        yield {"what": "fit", names[0]: constant, names[1]: entry}


def in_sequence(problem: Smooth, solver: dfx.AbstractSolver, num_steps: int, batch: int) -> dict:
    """A solve in one loop."""
    t1 = problem.t1 * num_steps / 16384
    solve = parallel(problem, num_steps, t1, solver, policy=SEQUENTIAL)
    fn = solve if batch == 1 else jax.vmap(solve)
    starts = [y if batch == 1 else jnp.broadcast_to(y, (batch, *y.shape)) for y in problem.starts(3)]
    _, times = harness.clock(harness.build(fn, starts[0]).call, starts, 10)
    estimate = pdx.diagnostics.estimate_cost(
        problem.term, solver, 0.0, t1, jnp.asarray(problem.y0), problem.args, num_steps=num_steps, batch_size=batch
    )
    row = {"what": "measured", "way": "in sequence", "N": num_steps, "D": len(problem.y0), "batch": batch}
    row |= {"solver": type(solver).__name__, "operations": estimate.kernel_operations}
    return row | {"seconds": 1e-3 * times["median_ms"], "estimate": estimate.seconds_in_sequence}


def in_parallel(problem: Smooth, num_steps: int, size: int, intervals: bool) -> dict:
    """A solve of all steps together, by multiple shooting or without it."""
    t1 = problem.t1 * min(num_steps / 16384, 1.0)
    with contextlib.ExitStack() as stack:
        if not intervals:
            length = _driver.interval_length
            _driver.interval_length = lambda *_: 1
            stack.callback(setattr, _driver, "interval_length", length)
        jax.clear_caches()
        program = harness.build(parallel(problem, num_steps, t1), problem.starts(1)[0])
    (_, counts), times = harness.clock(program.call, problem.starts(3), 10)
    row = {"what": "measured", "way": "in parallel", "N": num_steps, "D": size, "intervals": intervals}
    row |= {"seconds": 1e-3 * times["median_ms"], "success": bool(counts["success"])}
    operations = 1.0 if intervals else None
    return row | {"estimate": _cost.seconds_in_parallel(num_steps, size, 1, operations)}
