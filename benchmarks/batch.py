"""Batch size against the number of steps: where parallel-in-time stops paying.

The problem is FitzHugh-Nagumo by Tsit5 under `vmap`, from a batch of different initial states. A device that is busy with
many members gains less from solving the steps of each member at once. Two baselines are measured: the loop by hand under
`vmap`, in vectors and in scalars, each with its fastest unrolling; and sequential Diffrax, extrapolated from 512 steps.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from . import harness
from .smooth_problems import counts_row, FITZHUGH_NAGUMO, hand_written, parallel, sequential


PROBLEM = FITZHUGH_NAGUMO
STEP = PROBLEM.t1 / 16384
TIMED = 512


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    lengths, batches = ([256], [1, 16]) if quick else ([1024, 16384], [1, 32, 1024])
    forms = [(scalars, unroll) for scalars in (False, True) for unroll in ((1,) if quick else (1, 4, 16))]
    fns = {}
    for batch in batches:
        start = members(batch, 1)[0]
        fns["diffrax", batch] = jax.vmap(in_sequence), start
        for n in lengths:
            fns["parallel", n, batch] = jax.vmap(parallel(PROBLEM, n, n * STEP)), start
            for scalars, unroll in forms:
                loop = hand_written(PROBLEM, n, unroll, n * STEP, scalars)
                fns["scan", n, batch, scalars, unroll] = jax.vmap(loop), start
    programs = harness.build_all(fns)
    for batch in batches:
        _, base = harness.clock(programs["diffrax", batch].call, members(batch, 3), 3)
        for n in lengths:
            row = {"N": n, "batch": batch, "T": n * STEP, "diffrax_ms": base["median_ms"] * n / TIMED}
            row |= {"extrapolated": n != TIMED}
            loops = {form: programs["scan", n, batch, *form] for form in forms}
            try:
                yield row | compare(programs["parallel", n, batch], loops, members(batch, 4), row["diffrax_ms"])
            except jax.errors.JaxRuntimeError as error:  # the largest case may exceed the memory
                yield row | {"failed": str(error)[:300]}


def members(batch: int, count: int) -> list:
    """`count` batches of initial states."""
    spread = np.random.default_rng(0).normal(size=(count, batch, 2))
    return [jnp.asarray(PROBLEM.y0 + 0.3 * spread[k]) for k in range(count)]


def in_sequence(y0):
    """Sequential Diffrax over `TIMED` steps."""
    return sequential(PROBLEM, TIMED, STEP)((y0, jnp.asarray(TIMED)))


def compare(program, loops, starts, diffrax_ms: float) -> dict:
    """Entries of the row for one number of steps and one batch size."""
    (y, counts), times = harness.clock(program.call, starts, 7)
    by_form, exact = {}, jnp.nan
    for form, loop in loops.items():
        exact, measured = harness.clock(loop.call, starts, 3)
        by_form[form] = measured["median_ms"]
    mine, best = times["median_ms"], min(by_form, key=lambda form: by_form[form])
    vectors = min(time for (scalars, _), time in by_form.items() if not scalars)
    return {
        "parallel_ms": mine,
        "scan_ms": by_form[best],
        "scan_form": "scalars" if best[0] else "vectors",
        "scan_unroll": best[1],
        "scan_vectors_ms": vectors,
        "over_diffrax": diffrax_ms / mine,
        "over_scan": by_form[best] / mine,
        "over_scan_vectors": vectors / mine,
        "difference": float(jnp.max(jnp.abs(y - exact) / (1 + jnp.abs(exact)))),
    } | counts_row(counts)
