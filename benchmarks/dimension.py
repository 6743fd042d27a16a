"""The size of the state, from 2 to 128. Full Jacobians cost `N D^3` work and `N D^2` memory per iteration.

The problem is a ring of FitzHugh-Nagumo oscillators, each coupled to its neighbours, by Tsit5. The parallel solve is
compared with the loop by hand at its fastest unrolling, and with sequential Diffrax, extrapolated from 512 steps.
"""

from collections.abc import Iterator

import jax.numpy as jnp

from . import harness
from .smooth_problems import counts_row, hand_written, parallel, ring, sequential


TIMED = 512
STEP = 100.0 / 4096


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    num_steps, sizes = (256, (2, 8)) if quick else (4096, (2, 8, 32, 128))
    problems, t1 = {size: ring(size) for size in sizes}, num_steps * STEP
    fns = {}
    for size, problem in problems.items():
        start = problem.starts(1)[0]
        fns[size, "parallel"] = parallel(problem, num_steps, t1), start
        fns[size, "diffrax"] = sequential(problem, TIMED, STEP), (start, jnp.asarray(TIMED))
        for unroll in (1, 4, 8):
            fns[size, unroll] = hand_written(problem, num_steps, unroll, t1), start
    programs = harness.build_all(fns)
    for size, problem in problems.items():
        starts = problem.starts(4)
        (y, counts), times = harness.clock(programs[size, "parallel"].call, starts, 5 if quick else 9)
        loops = {}
        for unroll in (1, 4, 8):
            exact, measured = harness.clock(programs[size, unroll].call, starts, 3)
            loops[unroll] = measured["median_ms"]
        pairs = [(y0, jnp.asarray(TIMED)) for y0 in starts]
        diffrax_ms = harness.clock(programs[size, "diffrax"].call, pairs, 3)[1]["median_ms"] * num_steps / TIMED
        mine, unroll = times["median_ms"], min(loops, key=lambda unroll: loops[unroll])
        row = {"D": size, "N": num_steps, "T": t1, "parallel_ms": mine, "scan_ms": loops[unroll], "scan_unroll": unroll}
        row |= {"diffrax_ms": diffrax_ms, "extrapolated": num_steps != TIMED}
        row |= {"over_diffrax": diffrax_ms / mine, "over_scan": loops[unroll] / mine}
        yield row | {"difference": float(jnp.max(jnp.abs(y - exact) / (1 + jnp.abs(exact))))} | counts_row(counts)
