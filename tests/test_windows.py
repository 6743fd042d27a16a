"""Under `Windows()` the fine steps are those of the base solver alone: by `dt0`, or at given times, in either direction of
time; and what cannot be laid out is refused."""

import dataclasses
import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, FAILED_CHECK, relative_difference


T1 = 10.0
CHEAP = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}


@functools.cache
def solver(num_steps, **options):
    return pdx.ParallelSolver(dfx.Bosh3(), num_steps, **CHEAP, **options)


def solve(solver, t0, t1, dt0, args=DRIVEN_ARGS, controller=pdx.Windows()):
    ts = jnp.asarray(t0) + jnp.linspace(0.0, 1.0, 23) * (t1 - t0)
    saveat = dfx.SaveAt(ts=ts.at[-1].set(t1), t1=True, solver_state=True)
    return dfx.diffeqsolve(
        DRIVEN, solver, t0, t1, dt0, DRIVEN_Y0, args, saveat=saveat, stepsize_controller=controller, max_steps=256
    )


@jax.jit
def uniform(t0, t1, dt0, args):
    return solve(solver(64), t0, t1, dt0, args)


@jax.jit
def sequential(t0, t1, dt0, args):
    return solve(dfx.Bosh3(), t0, t1, dt0, args, dfx.ConstantStepSize()).ys


def with_derivatives(solve):
    """One program for the solution and for the derivatives of a sum over its last state by times and arguments. The first
    and the last time move the span too, which ends so much before the last time."""

    def value(ts, args, early):
        sol = solve(ts, ts[0], ts[-1] - early, args)
        return jnp.sum(jnp.sin(sol.ys[-1])), sol

    both = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))

    def unpacked(ts, args, early=0.0):
        (_, sol), gradients = both(ts, args, early)
        return sol, gradients

    return unpacked


@with_derivatives
def listed(ts, t0, t1, args):
    return solve(dataclasses.replace(solver(64), ts=ts), t0, t1, None, args)


@with_derivatives
def stepped_to(ts, t0, t1, args):
    return solve(dfx.Bosh3(), t0, t1, None, args, dfx.StepTo(ts))


ZERO, END = jnp.array(0.0), jnp.array(T1)
GRID = T1 * np.sort(np.append(np.random.default_rng(0).uniform(size=149), [0.0, 1.0]))
GRID = jnp.asarray(GRID)


def test_the_fine_steps_are_those_of_a_constant_step_size_in_both_directions():
    for t0, t1 in ((ZERO, END), (END, ZERO)):
        # As many steps as windows of 64 hold; the second is rounded so that its multiples miss the end.
        for dt0, windows in (((t1 - t0) / 256, 4), ((t1 - t0) / 128 * (1 - 1e-16), 2)):
            got = uniform(t0, t1, dt0, DRIVEN_ARGS)
            assert relative_difference(got.ys, sequential(t0, t1, dt0, DRIVEN_ARGS)) < 1e-12
            assert int(pdx.statistics(got).windows) == int(got.stats["num_steps"]) == windows
            assert int(pdx.statistics(got).parallel_steps) == 64 * windows


def test_fine_steps_are_never_longer_than_asked_for():
    # 200 steps are 4 windows of 64, and those 256 steps; 3 steps are one window.
    got = uniform(ZERO, END, END / 200, DRIVEN_ARGS)
    assert int(pdx.statistics(got).windows) == 4
    assert relative_difference(got.ys, sequential(ZERO, END, END / 256, DRIVEN_ARGS)) < 1e-12
    got = uniform(ZERO, END, END / 3, DRIVEN_ARGS)
    assert int(pdx.statistics(got).windows) == 1
    assert relative_difference(got.ys, sequential(ZERO, END, END / 64, DRIVEN_ARGS)) < 1e-12


def test_fine_steps_end_at_given_times_in_both_directions_and_derivatives_by_them_are_those_of_the_sequential_solve():
    # 150 steps in windows of 64: the last has 22.
    for grid in (GRID, GRID[::-1]):
        got, got_gradients = listed(grid, DRIVEN_ARGS)
        want, gradients = stepped_to(grid, DRIVEN_ARGS)
        assert relative_difference(got.ys, want.ys) < 1e-12
        statistics = pdx.statistics(got)
        assert (int(statistics.windows), int(statistics.parallel_steps), int(statistics.sequential_steps)) == (
            3,
            150,
            0,
        )
        for g, w in zip(got_gradients, gradients):
            assert relative_difference(g, w) < 1e-10


def test_the_derivative_by_times_on_which_the_step_depends_is_that_of_the_sequential_solve():
    def value(solver, controller, t0, t1):
        ys = solve(solver, t0, t1, (t1 - t0) / 128, controller=controller).ys
        return jnp.sum(jnp.sin(ys[-1]))

    derivative = jax.jit(jax.value_and_grad(value, argnums=(2, 3)), static_argnums=(0, 1))
    got = derivative(solver(64), pdx.Windows(), ZERO, END)
    want = derivative(dfx.Bosh3(), dfx.ConstantStepSize(), ZERO, END)
    assert relative_difference(jnp.stack([got[0], *got[1]]), jnp.stack([want[0], *want[1]])) < 1e-10


def test_an_empty_span_and_an_endless_one():
    two = jnp.array(2.0)
    empty = uniform(two, two, jnp.array(0.1), DRIVEN_ARGS).ys
    np.testing.assert_array_equal(empty, jnp.broadcast_to(DRIVEN_Y0, empty.shape))

    event = dfx.Event(lambda t, y, args, **kw: t > 7.0)
    endless = functools.partial(
        dfx.diffeqsolve, DRIVEN, t0=0.0, t1=jnp.inf, dt0=0.05, y0=DRIVEN_Y0, args=DRIVEN_ARGS, event=event
    )
    got = endless(solver=solver(10), stepsize_controller=pdx.Windows())
    np.testing.assert_allclose(got.ts, [7.5])
    want = dfx.diffeqsolve(DRIVEN, dfx.Bosh3(), 0.0, 7.5, 0.05, DRIVEN_Y0, DRIVEN_ARGS)
    assert relative_difference(got.ys, want.ys) < 1e-12


def test_what_has_no_windows_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="only `ParallelSolver` has windows"):
        solve(dfx.Tsit5(), 0.0, T1, 0.1)
    with pytest.raises(ValueError, match="`dt0` is the fine step; give one"):
        solve(solver(64), 0.0, T1, None)
    with pytest.raises(ValueError, match="expected `dt0=None`, since `ts` says"):
        solve(dataclasses.replace(solver(64), ts=GRID), 0.0, T1, 0.1)
    for ts in (jnp.zeros((2, 2)), jnp.zeros(1)):
        with pytest.raises(ValueError, match="a vector of at least two times"):
            pdx.ParallelSolver(dfx.Bosh3(), 64, ts=ts)


def test_times_that_do_not_fit_are_refused():
    with pytest.raises(FAILED_CHECK, match="must be strictly increasing"):
        jax.block_until_ready(listed(GRID.at[5].set(GRID[4]), DRIVEN_ARGS))
    with pytest.raises(FAILED_CHECK, match=r"expected `ts\[0\] == t0` and `ts\[-1\] == t1`"):
        jax.block_until_ready(listed(GRID, DRIVEN_ARGS, T1 / 2))
    # Another controller knows nothing of the times.
    parallel = dataclasses.replace(solver(64), ts=GRID)
    with pytest.raises(FAILED_CHECK, match="a window must begin and end at two of `ts`"):
        dfx.diffeqsolve(DRIVEN, parallel, 0.0, T1, 5.0, DRIVEN_Y0, DRIVEN_ARGS)
