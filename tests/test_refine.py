"""A refined solution is the unrefined one: the same values, derivatives and gradients, in both directions of time, over
several windows, windows that adapt, padding, steps of length zero, and steps that failed."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, parallel_solver, relative_difference


CHEAP = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}
DENSE = dfx.SaveAt(dense=True)
# 150 steps in windows of 64: the last has 22, of the six that there is room for three are used.
GRID = jnp.asarray(10.0 * np.sort(np.append(np.random.default_rng(0).uniform(size=149), [0.0, 1.0])))
TIMES = jnp.append(jnp.linspace(0.0, 10.0, 41), GRID[jnp.array([0, 1, 63, 64, 65, 128, 149, 150])])
OUTSIDE = jnp.where(jnp.arange(TIMES.size) % 2, -1.0, 10.1)


@functools.partial(jax.jit, static_argnames="controller")
def solve(ts, args, controller=pdx.Windows()):
    listed = isinstance(controller, pdx.Windows)
    solver = parallel_solver(dfx.Bosh3(), 64, ts=ts if listed else None, **CHEAP)
    dt0 = None if listed else ts[-1] - ts[0]
    return dfx.diffeqsolve(
        DRIVEN, solver, ts[0], ts[-1], dt0, DRIVEN_Y0, args, stepsize_controller=controller, saveat=DENSE, max_steps=6,
        throw=False,
    )  # fmt: skip


@jax.jit
def looked_at(sol, times):
    return [
        jax.vmap(lambda t, look=look, left=left: look(t, left=left))(times)
        for look in (sol.evaluate, sol.derivative)
        for left in (True, False)
    ]


def test_values_and_derivatives_are_those_of_the_windows():
    for grid in (GRID, GRID[::-1]):
        sol = solve(grid, DRIVEN_ARGS)
        assert sol.result == dfx.RESULTS.successful and int(sol.stats["num_steps"]) == 3
        fine = pdx.refine(sol)
        assert (type(fine.interpolation), fine.interpolation.ts.shape) == (dfx.DenseInterpolation, (6 * 64 + 1,))
        assert int(fine.interpolation.ts_size) == 151
        for got, want in zip(looked_at(fine, TIMES), looked_at(sol, TIMES)):
            assert np.isfinite(want).all()
            assert relative_difference(got, want) < 1e-14
        assert all(np.isnan(x).all() for x in looked_at(fine, OUTSIDE))
        assert relative_difference(fine.evaluate(2.0, 7.0), sol.evaluate(2.0, 7.0)) < 1e-14
        assert (fine.interpolation.t0, fine.interpolation.t1) == (grid[0], grid[-1])


def test_it_is_the_dense_output_of_a_sequential_solve():
    want = dfx.diffeqsolve(
        DRIVEN, dfx.Bosh3(), 0.0, 10.0, None, DRIVEN_Y0, DRIVEN_ARGS, stepsize_controller=dfx.StepTo(GRID), saveat=DENSE,
        max_steps=150,
    )  # fmt: skip
    fine = pdx.refine(solve(GRID, DRIVEN_ARGS))
    times = jnp.linspace(0.25, 9.75, TIMES.size)
    for got, expected in zip(looked_at(fine, times), looked_at(want, times)):
        assert relative_difference(got, expected) < 1e-10
    np.testing.assert_array_equal(fine.interpolation.ts[:151], want.interpolation.ts)


def test_windows_that_adapt_and_windows_that_fail():
    controller = dfx.PIDController(rtol=1e-9, atol=1e-9)
    sol = solve(20.0 * GRID, DRIVEN_ARGS, controller=controller)
    # There was no room for all of them.
    assert sol.result == dfx.RESULTS.max_steps_reached
    end = float(sol.interpolation.t1)
    times = jnp.linspace(0.0, end, TIMES.size)
    for got, want in zip(looked_at(pdx.refine(sol), times), looked_at(sol, times)):
        assert np.isfinite(want).all()
        assert relative_difference(got, want) < 1e-14

    # From some time on there is no finite state: those before keep their values.
    sol = solve(GRID, DRIVEN_ARGS.at[1].set(-1e3))
    assert sol.result != dfx.RESULTS.successful
    for got, want in zip(looked_at(pdx.refine(sol), TIMES), looked_at(sol, TIMES)):
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_allclose(np.nan_to_num(got), np.nan_to_num(want), rtol=1e-13)
        assert np.isnan(got).any()


def test_gradients_pass_through():
    def values(args):
        sol = solve(GRID, args)
        return jnp.stack([jnp.sum(jnp.sin(jax.vmap(s.evaluate)(TIMES))) for s in (pdx.refine(sol), sol)])

    got, want = jax.jit(jax.jacrev(values))(DRIVEN_ARGS)
    assert np.abs(want).min() > 1e-3
    assert relative_difference(got, want) < 1e-12


def test_a_batch_is_refined_member_by_member():
    members = [solve(GRID, args) for args in (DRIVEN_ARGS, 0.5 * DRIVEN_ARGS)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *members)
    with pytest.raises(ValueError, match=r"Use `jax.vmap\(refine\)\(sol\)`"):
        pdx.refine(batch)
    got = jax.jit(jax.vmap(lambda sol: pdx.refine(sol).evaluate(4.3)))(batch)
    assert relative_difference(got, jnp.stack([sol.evaluate(4.3) for sol in members])) < 1e-14


def test_what_cannot_be_refined_is_refused():
    plain = dfx.diffeqsolve(DRIVEN, dfx.Euler(), 0.0, 1.0, 0.5, DRIVEN_Y0, DRIVEN_ARGS, saveat=DENSE, max_steps=2)
    with pytest.raises(ValueError, match="which has one step an interval already"):
        pdx.refine(plain)
    with pytest.raises(ValueError, match=r"SaveAt\(dense=True\)"):
        pdx.refine(dfx.diffeqsolve(DRIVEN, dfx.Euler(), 0.0, 1.0, 0.5, DRIVEN_Y0, DRIVEN_ARGS))
