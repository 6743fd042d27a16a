"""The first table of the design: eight problems in one window each, against sequential Diffrax on the same grid.

In float64 the difference is rounding, at most five Newton iterations on the whole window are made and no sequential steps,
by the default policy (the four problems of two components) or none. In float32 the iteration ends by its own test, and the
result is as near to the float64 trajectory as sequential float32 is.
"""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import only_full, parallel_solver, PROBLEMS, relative_difference


NUM_SAVED = 50
# In float32, one that oscillates and one that is stiff (all eight: `benchmarks/README.md`).
SINGLE = ("Lotka-Volterra", "heat")
PLANAR = [name for name, problem in PROBLEMS.items() if problem.y0.shape == (2,)]


@functools.cache
def program(solver, num_steps, field, parallel):
    """One solve, compiled for every problem with these. The default policy cuts none of them, and is compiled once."""
    policy = pdx.AdaptivePolicy() if field is planar else pdx.policies.ParallelOnly()

    @jax.jit
    def solve(y0, t1, args):
        t0 = jnp.zeros_like(t1)
        saveat = dfx.SaveAt(ts=jnp.linspace(t0, t1, NUM_SAVED), solver_state=True)
        with_windows, windows = (
            (parallel_solver(solver, num_steps, policy=policy), 1) if parallel else (solver, num_steps)
        )
        term, max_steps = dfx.ODETerm(field), windows + 8
        return dfx.diffeqsolve(
            term, with_windows, t0, t1, t1 / windows, y0, args, saveat=saveat, max_steps=max_steps, throw=False
        )

    return solve


def monomials(y):
    a, b = y[0], y[1]
    return [1 + 0 * a, a, b, a * b, a**2 * b, a**3]


def planar(t, y, coefficients):
    """All fields of two components: polynomials, whose coefficients are arguments, so that they are compiled once."""
    return coefficients @ jnp.stack(monomials(y))


def coefficients_of(field):
    """From the field's values at 30 points."""
    points = np.random.default_rng(0).uniform(-1, 1, (2, 30))
    values = np.asarray(field(0.0, points))
    coefficients = np.linalg.lstsq(np.stack(monomials(points), axis=1), values.T)[0].T
    np.testing.assert_allclose(planar(0.0, points[:, 0], coefficients), values[:, 0], rtol=1e-13)
    return coefficients


@functools.cache
def field_of(name):
    """A field with arguments, and these. Always the same field, for the sake of the cache of programs."""
    field = PROBLEMS[name].field
    return (planar, coefficients_of(field)) if name in PLANAR else (lambda t, y, args: field(t, y), np.zeros(()))


def solve(name, dtype, parallel):
    problem = PROBLEMS[name]
    field, args = field_of(name)
    run = program(problem.solver, problem.num_steps, field, parallel)
    sol = run(*(jnp.asarray(x, dtype) for x in (problem.y0, problem.t1, args)))
    assert sol.result == dfx.RESULTS.successful
    assert sol.ys.dtype == dtype
    return sol


def check_single_precision(name, exact):
    single, sequential = (solve(name, jnp.float32, parallel) for parallel in (True, False))
    assert int(pdx.statistics(single).sequential_steps) == 0
    size = np.max(np.abs(exact), axis=0)
    ours, theirs = (np.max(np.abs(np.asarray(s.ys, np.float64) - exact) / size) for s in (single, sequential))
    assert ours <= 3 * theirs, (ours, theirs)


def check(name):
    problem = PROBLEMS[name]
    exact = solve(name, jnp.float64, parallel=False).ys
    sol = solve(name, jnp.float64, parallel=True)
    statistics = pdx.statistics(sol)
    assert relative_difference(sol.ys, exact) <= problem.tolerance
    assert int(statistics.iterations) <= 5
    assert int(statistics.sequential_steps) == 0
    assert int(statistics.parallel_steps) == problem.num_steps
    assert int(statistics.predictor_steps) <= problem.num_steps // 4
    assert float(statistics.residual) <= 1e-13
    if name in SINGLE:
        check_single_precision(name, exact)


# Those that share a program together, so that it is compiled once, whatever the number of workers.
@pytest.mark.parametrize(
    "names", [PLANAR, *only_full(*([name] for name in PROBLEMS if name not in PLANAR))], ids=", ".join
)
def test_one_window_is_the_sequential_trajectory(names):
    for name in names:
        check(name)
