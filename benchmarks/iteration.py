"""The cost of one Newton iteration: linearisation, scan, update, and the tests of convergence.

The same solve runs with 2 and with 10 iterations, and the difference of the times is divided by eight. The guess is
constant, so that FitzHugh-Nagumo over T = 400 needs more than 10 iterations. The tolerances are zero, so that none is
skipped. Another number of iterations is an error. The cost of an iteration does not depend on its progress.
"""

from collections.abc import Iterator

import jax.numpy as jnp

import parallel_diffrax as pdx

from . import harness
from .smooth_problems import FITZHUGH_NAGUMO, parallel


PROBLEM = FITZHUGH_NAGUMO
FEW, MANY = 2, 10


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    for n in [4096] if quick else [16384, 262_144]:
        solves = {
            count: parallel(
                PROBLEM,
                n,
                root_finder=pdx.ParallelNewton(rtol=0.0, atol=0.0),
                root_find_max_steps=count,
                predictor=pdx.ConstantPredictor(),
                policy=pdx.policies.ParallelOnly(),
            )
            for count in (FEW, MANY)
        }
        starts = PROBLEM.starts(4)
        programs = harness.build_all({count: (solve, starts[0]) for count, solve in solves.items()})
        times = {}
        for count, program in programs.items():
            (y, counts), times[count] = harness.clock(program.call, starts, 7 if quick else 31)
            made = int(counts["iterations"])
            if made != count or not bool(jnp.all(jnp.isfinite(y))):
                raise RuntimeError(f"{count} iterations were requested, but {made} were made, and the end state is {y}")
        per_iteration = (times[MANY]["median_ms"] - times[FEW]["median_ms"]) / (MANY - FEW)
        fastest = (times[MANY]["min_ms"] - times[FEW]["min_ms"]) / (MANY - FEW)
        row = {"what": "iteration", "N": n, "D": 2, "iteration_ms": per_iteration, "iteration_min_ms": fastest}
        yield row | {f"{count}_iterations_ms": times[count]["median_ms"] for count in times}
