"""Batches of steps in sequence: one kernel with a thread per member, against Diffrax and the loop by hand under `vmap`.

Rows of `fixed`: 512 steps of FitzHugh-Nagumo by Tsit5, in float64, from a batch of initial states; whole solves. Rows of
`adaptive`: Lorenz with as many values of `rho`, from 0 to 1 at tolerances 1e-8 and 1e-11, end states only. That is the loop
itself, since no policy chooses it yet: an adaptive solve in one kernel.
"""

import functools
from collections.abc import Iterator

import diffrax as dfx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np

import parallel_diffrax as pdx
from parallel_diffrax._kernels import indexed_loop

from . import harness
from .batch import in_sequence, members, PROBLEM, STEP, TIMED
from .smooth_problems import hand_written


RTOL, ATOL = 1e-8, 1e-11
LORENZ_START = (1.0, 0.0, 0.0)


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    for batch in (1, 16) if quick else (1, 1024, 131072):
        yield fixed(batch)
    for batch in (16,) if quick else (1024, 32768, 524288):
        yield adaptive(batch)


def fixed(batch: int) -> dict:
    """The row of one batch of fixed steps."""
    solver = pdx.ParallelSolver(dfx.Tsit5(), TIMED, policy=pdx.policies.Sequential())
    t1 = TIMED * STEP

    def in_kernel(y0):
        sol = dfx.diffeqsolve(PROBLEM.term, solver, 0.0, t1, t1, y0, PROBLEM.args, max_steps=1)
        assert sol.ys is not None
        return sol.ys[-1]

    forms = [(scalars, unroll) for scalars in (False, True) for unroll in (1, 4)]
    fns = {"diffrax": in_sequence, "sequence": in_kernel}
    fns |= {form: hand_written(PROBLEM, TIMED, form[1], t1, form[0]) for form in forms}
    starts = members(batch, 3)
    programs = harness.build_all({name: (jax.vmap(fn), starts[0]) for name, fn in fns.items()})
    y, times = harness.clock(programs["sequence"].call, starts, 50)
    exact, diffrax = harness.clock(programs["diffrax"].call, starts, 5)
    by_hand = min(harness.clock(programs[form].call, starts, 10)[1]["median_ms"] for form in forms)
    row = {"kind": "fixed", "N": TIMED, "batch": batch, "sequence_ms": times["median_ms"], "min_ms": times["min_ms"]}
    row |= {"diffrax_ms": diffrax["median_ms"], "scan_ms": by_hand}
    return row | {"difference": float(jnp.max(jnp.abs(y - exact) / (1 + jnp.abs(exact))))}


def lorenz(y, rho):
    """The vector field."""
    a, b, c = y
    return jnp.stack([10.0 * (b - a), a * (rho - c) - b, a * b - 8.0 / 3.0 * c])


def lorenz_in_one_loop(rho):
    """The state at time 1 and the number of steps: Tsit5 with an integral controller."""
    tableau = dfx.Tsit5.tableau
    combine = lambda weights, slopes: functools.reduce(jnp.add, (float(w) * k for w, k in zip(weights, slopes) if w))

    def body(carry, _):
        t, y, slope, h, count = carry
        h, slopes = jnp.minimum(h, 1.0 - t), [slope]
        for weights in tableau.a_lower:
            slopes.append(lorenz(y + h * combine(weights, slopes), rho))
        y1, error = y + h * combine(tableau.b_sol, slopes), h * combine(tableau.b_error, slopes)
        square = jnp.mean((error / (ATOL + RTOL * jnp.maximum(jnp.abs(y), jnp.abs(y1)))) ** 2)
        factor = jnp.clip(0.9 * jnp.exp(jnp.log(jnp.maximum(square, 1e-24)) * -0.1), 0.2, 10.0)
        taken = [jnp.where(square <= 1, new, old) for new, old in ((t + h, t), (y1, y), (slopes[-1], slope))]
        more = (taken[0] < 1.0 - 1e-14) & (count < 4096)
        return (*taken, h * factor, count + 1), (), jnp.zeros((), jnp.int32), jnp.where(more, 0, -1)

    y0, zero = jnp.array(LORENZ_START), jnp.zeros((), jnp.int32)
    (_, y, *_, count), *_ = indexed_loop(
        body, (jnp.array(0.0), y0, lorenz(y0, rho), jnp.array(1e-3), zero), zero, (), 1
    )
    return y, count


def adaptive(batch: int) -> dict:
    """The row of one batch of adaptive solves."""
    rhos = [jnp.linspace(0.0, 21.0 - 1e-3 * k, batch) for k in range(3)]
    field = dfx.ODETerm(lambda t, y, rho: lorenz(y, rho))

    def accurate(rho):
        controller = dfx.PIDController(rtol=1e-12, atol=1e-14)
        sol = dfx.diffeqsolve(
            field, dfx.Tsit5(), 0.0, 1.0, None, jnp.array(LORENZ_START), rho, stepsize_controller=controller
        )
        assert sol.ys is not None
        return sol.ys[-1]

    program = harness.build(jax.vmap(lorenz_in_one_loop), rhos[0])
    (y, count), times = harness.clock(program.call, rhos, 50)
    some = np.linspace(0, batch - 1, min(batch, 256)).astype(int)
    exact = jax.jit(lambda rhos: lax.map(accurate, rhos, batch_size=256))(rhos[0][some])
    error = jnp.linalg.norm(y[some] - exact, axis=1) / jnp.linalg.norm(exact, axis=1)
    row = {"kind": "adaptive", "batch": batch, "loop_ms": times["median_ms"], "min_ms": times["min_ms"]}
    row |= {"median_relative_error": float(jnp.median(error)), "steps": [int(count.min()), int(count.max())]}
    return row | program.times
