"""The first table of the design: eight problems in one window each, against sequential Diffrax on the same grid.

In float64 the difference is rounding, at most five Newton iterations are made and no sequential steps. In float32 the
iteration ends by its own test, and the result is as near to the float64 trajectory as sequential float32 is.
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import PROBLEMS, relative_difference


NUM_SAVED = 50
# In float32, the four on which sequential float32 loses most or least (all eight: `benchmarks/README.md`).
SINGLE = ("FitzHugh-Nagumo", "Lotka-Volterra", "Kepler, e = 0.6", "heat")


def solve(problem, dtype, parallel):
    t0, t1 = jnp.zeros((), dtype), jnp.asarray(problem.t1, dtype)
    saveat = dfx.SaveAt(ts=jnp.linspace(t0, t1, NUM_SAVED), solver_state=True)
    solver, windows = problem.solver, problem.num_steps
    if parallel:
        solver, windows = pdx.ParallelSolver(problem.solver, problem.num_steps), 1
    y0 = jnp.asarray(problem.y0, dtype)
    sol = dfx.diffeqsolve(problem.term, solver, t0, t1, t1 / windows, y0, saveat=saveat, max_steps=windows + 8)
    assert sol.ys.dtype == dtype
    return sol


def check_single_precision(problem, exact):
    single = solve(problem, jnp.float32, parallel=True)
    sequential = solve(problem, jnp.float32, parallel=False)
    assert single.result == dfx.RESULTS.successful
    assert int(single.solver_state.sequential_steps) == 0
    size = np.max(np.abs(exact), axis=0)
    ours, theirs = (np.max(np.abs(np.asarray(s.ys, np.float64) - exact) / size) for s in (single, sequential))
    assert ours <= 3 * theirs, (ours, theirs)


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_window_is_the_sequential_trajectory(name):
    problem = PROBLEMS[name]
    exact = solve(problem, jnp.float64, parallel=False).ys
    sol = solve(problem, jnp.float64, parallel=True)
    statistics = sol.solver_state
    assert sol.result == dfx.RESULTS.successful
    assert relative_difference(sol.ys, exact) <= problem.tolerance
    assert int(statistics.iterations) <= 5
    assert int(statistics.sequential_steps) == 0
    assert int(statistics.parallel_steps) == problem.num_steps
    assert int(statistics.predictor_steps) <= problem.num_steps // 4
    assert float(statistics.residual) <= 1e-13
    if name in SINGLE:
        check_single_precision(problem, exact)


def test_chaos_beyond_prediction_satisfies_every_step_and_agrees_for_as_long_as_it_can():
    # Lorenz over 40 time units: rounding grows by exp(0.9 * 40). Half of it is left to the sequential fallback.
    problem = PROBLEMS["Lorenz-63"]
    ts = jnp.linspace(0.0, 40.0, 4097)
    saveat = dfx.SaveAt(ts=ts, solver_state=True)
    solver = pdx.ParallelSolver(problem.solver, 4096)
    y0 = jnp.asarray(problem.y0)
    sol = dfx.diffeqsolve(problem.term, solver, 0.0, 40.0, 40.0, y0, saveat=saveat, max_steps=1)
    assert sol.result == dfx.RESULTS.successful

    def one_step(t0, t1, y):
        return problem.solver.step(
            problem.term, t0, t1, y, None, problem.solver.init(problem.term, t0, t1, y, None), made_jump=True
        )[0]

    stepped = jax.vmap(one_step)(ts[:-1], ts[1:], sol.ys[:-1])
    assert float(jnp.max(jnp.abs(stepped - sol.ys[1:]))) < 1e-9
    sequential = dfx.diffeqsolve(
        problem.term, problem.solver, 0.0, 15.0, 40.0 / 4096, y0, saveat=dfx.SaveAt(ts=ts[:1537]), max_steps=2000
    )
    assert relative_difference(sol.ys[:1500], sequential.ys[:1500]) < 1e-7
