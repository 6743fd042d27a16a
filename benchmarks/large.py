"""Very many steps of one trajectory: what a solve and its gradient take in memory and time.

`memory` rows are compiled only, with the temporary memory that XLA reserves, in arrays of `N` states. `time` rows run.
"""

from collections.abc import Iterator

import diffrax as dfx
import jax
import jax.numpy as jnp

import parallel_diffrax as pdx

from . import harness
from .smooth_problems import FITZHUGH_NAGUMO, parallel, ring, Smooth


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    for what, problem, size, num_steps in (
        ("memory", ring(4), 4, 4096 if quick else 2**22),
        ("time", FITZHUGH_NAGUMO, 2, 4096 if quick else 10**8),
    ):
        for gradient in (False, True):
            yield row(what, problem, size, num_steps, gradient)


def row(what: str, problem: Smooth, size: int, num_steps: int, gradient: bool) -> dict:
    solve = parallel(problem, num_steps)

    def loss(y0):
        solver = pdx.ParallelSolver(dfx.Tsit5(), num_steps, policy=pdx.AdaptivePolicy())
        options = dict(max_steps=1, adjoint=dfx.DirectAdjoint())
        sol = dfx.diffeqsolve(problem.term, solver, 0.0, problem.t1, problem.t1, y0, problem.args, **options)  # pyright: ignore
        assert sol.ys is not None
        return jnp.sum(sol.ys**2)

    program = harness.build(jax.grad(loss) if gradient else lambda y0: solve(y0)[0], problem.starts(1)[0])
    temporary = program.call.memory_analysis().temp_size_in_bytes  # pyright: ignore[reportFunctionMemberAccess]
    found = {"what": what, "N": num_steps, "D": size, "gradient": gradient, "compile_s": program.compile_s}
    found |= {"temporary_GB": temporary / 1e9, "arrays_of_states": temporary / (8 * size * num_steps)}
    if what == "time":
        value, times = harness.clock(program.call, problem.starts(3), 5)
        found |= times | {"finite": bool(jnp.all(jnp.isfinite(value)))}
    return found
