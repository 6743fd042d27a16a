"""Under `Windows()` the fine steps are those of the base solver alone: by `dt0`, or at given times, in either direction of
time; and what cannot be laid out is refused."""

import dataclasses
import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, FAILED_CHECK, only_full, parallel_solver, relative_difference


T1 = 10.0
CHEAP = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}


@functools.cache
def solver(num_steps, **options):
    return parallel_solver(dfx.Bosh3(), num_steps, **CHEAP, **options)


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
    return solve(dfx.Bosh3(), t0, t1, dt0, args, dfx.ConstantStepSize())


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
    # Steps that fill windows; a step rounded so that its multiples miss the end; a last window of 8 and of 22 steps; one
    # window of 3 steps, the first of which Diffrax makes longer; a step longer than the span.
    cases = ((256, 4), (128 * (1 + 1e-16), 2), (200, 4), (149.5, 3), (2.3, 1), (0.2, 1))
    for t0, t1 in ((ZERO, END), (END, ZERO)):
        for steps, windows in cases:
            got = uniform(t0, t1, (t1 - t0) / steps, DRIVEN_ARGS)
            want = sequential(t0, t1, (t1 - t0) / steps, DRIVEN_ARGS)
            assert relative_difference(got.ys, want.ys) < 1e-12
            statistics = pdx.statistics(got)
            assert int(statistics.windows) == int(got.stats["num_steps"]) == windows
            assert int(statistics.parallel_steps) == int(want.stats["num_steps"])


def test_late_times_in_float32_have_the_steps_of_a_constant_step_size():
    # Diffrax moves the ends of the last seven steps to the end of the span.
    t0, dt0 = jnp.array(100, jnp.float32), jnp.array(2.0**-13, jnp.float32)
    y0 = DRIVEN_Y0.astype(jnp.float32)
    solve = functools.partial(dfx.diffeqsolve, DRIVEN, y0=y0, args=DRIVEN_ARGS.astype(jnp.float32), max_steps=256)
    saveat = dfx.SaveAt(steps=True, solver_state=True)
    want = solve(dfx.Bosh3(), t0=t0, t1=t0 + 128 * dt0, dt0=dt0, saveat=saveat)
    for num_steps in (1, 50):
        controller = pdx.Windows()
        got = solve(solver(num_steps), t0=t0, t1=t0 + 128 * dt0, dt0=dt0, saveat=saveat, stepsize_controller=controller)
        assert int(pdx.statistics(got).parallel_steps) == int(want.stats["num_steps"]) == 122
        np.testing.assert_array_equal(got.ts[: -(-122 // num_steps) - 1], want.ts[num_steps - 1 : 121 : num_steps])
        np.testing.assert_allclose(got.ys[-(-122 // num_steps) - 1], want.ys[121], rtol=1e-6)


def test_times_and_states_may_have_half_precision():
    t0, t1, dt0 = (jnp.array(t, jnp.float16) for t in (0.0, 1.0, 0.1))
    term, saveat = dfx.ODETerm(lambda t, y, args: -y), dfx.SaveAt(ts=jnp.linspace(t0, t1, 4))
    solve = functools.partial(dfx.diffeqsolve, term, t0=t0, t1=t1, dt0=dt0, y0=jnp.ones(1, jnp.float16), saveat=saveat)
    got = solve(solver=pdx.ParallelSolver(dfx.Heun(), 4), stepsize_controller=pdx.Windows())
    np.testing.assert_allclose(got.ys, solve(solver=dfx.Heun()).ys, rtol=4e-3)


def test_a_multi_step_method_stands_still_in_steps_of_length_zero():
    solve = functools.partial(dfx.diffeqsolve, DRIVEN, t0=0.0, t1=1.0, dt0=0.1, y0=DRIVEN_Y0, args=DRIVEN_ARGS)
    got = solve(solver=parallel_solver(dfx.LeapfrogMidpoint(), 16), stepsize_controller=pdx.Windows())
    assert relative_difference(got.ys, solve(solver=dfx.LeapfrogMidpoint()).ys) < 1e-12


def test_spans_of_a_batch_may_differ_and_the_solver_outside_remains_as_it_is():
    ends = jnp.array([0.3, 1.0, 7.77])
    got = jax.vmap(lambda t1: uniform(ZERO, t1, jnp.array(0.05), DRIVEN_ARGS))(ends)
    want = jax.vmap(lambda t1: sequential(ZERO, t1, jnp.array(0.05), DRIVEN_ARGS))(ends)
    assert relative_difference(got.ys, want.ys) < 1e-12
    np.testing.assert_array_equal(pdx.statistics(got).parallel_steps, want.stats["num_steps"])
    assert solver(64).grid is None


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


# A fixed step ends the first fine step, and Diffrax divides the rest of the span equally.
@pytest.mark.full
@pytest.mark.parametrize("step", ["fixed", "a share of the span"])
def test_the_derivatives_by_times_and_by_the_step_are_those_of_the_sequential_solve_and_finite_differences(step):
    def value(solver, controller, t0, t1, dt0):
        dt0 = dt0 if step == "fixed" else (t1 - t0) / 128
        return jnp.sum(jnp.sin(solve(solver, t0, t1, dt0, controller=controller).ys[-1]))

    derivative = jax.jit(jax.value_and_grad(value, argnums=(2, 3, 4)), static_argnums=(0, 1))
    times = ZERO, END, jnp.array(0.3)
    got, got_gradient = derivative(solver(64), pdx.Windows(), *times)
    want, gradient = derivative(dfx.Bosh3(), dfx.ConstantStepSize(), *times)
    assert relative_difference(jnp.stack([got, *got_gradient]), jnp.stack([want, *gradient])) < 1e-10
    if step != "fixed":
        return
    shifted = lambda h: derivative(solver(64), pdx.Windows(), ZERO, END, 0.3 + h)[0]
    difference = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
    assert abs(difference - got_gradient[2]) < 1e-8 < 1e-5 < abs(difference)


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
            parallel_solver(dfx.Bosh3(), 64, ts=ts)


def test_times_that_do_not_fit_are_refused():
    with pytest.raises(FAILED_CHECK, match="must be strictly increasing"):
        jax.block_until_ready(listed(GRID.at[5].set(GRID[4]), DRIVEN_ARGS))
    with pytest.raises(FAILED_CHECK, match=r"expected `ts\[0\] == t0` and `ts\[-1\] == t1`"):
        jax.block_until_ready(listed(GRID, DRIVEN_ARGS, T1 / 2))
    # Another controller knows nothing of the times.
    parallel = dataclasses.replace(solver(64), ts=GRID)
    with pytest.raises(FAILED_CHECK, match="a window must begin and end at two of `ts`"):
        dfx.diffeqsolve(DRIVEN, parallel, 0.0, T1, 5.0, DRIVEN_Y0, DRIVEN_ARGS)


@pytest.mark.parametrize(
    "policy",
    [pdx.policies.AdaptivePolicy(), *only_full(pdx.policies.ParallelOnly(), pdx.policies.ParallelThenSequential())],
    ids=lambda policy: type(policy).__name__,
)
def test_the_field_may_be_infinite_where_the_last_step_ends(policy):
    """The steps of length zero that fill the last window begin there."""
    field = lambda t, y, rate: jnp.where(y > 0.95, jnp.inf, rate)
    ts = jnp.array([0.33, 1.0])

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def solve(rate):
        solver = parallel_solver(dfx.Euler(), 4, policy=policy)
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field), solver, 0.0, 1.0, 0.1, jnp.zeros(1), rate, saveat=dfx.SaveAt(ts=ts),
            stepsize_controller=pdx.Windows(), max_steps=8,
        )  # fmt: skip
        return jnp.sum(sol.ys)

    np.testing.assert_allclose(jnp.stack(solve(jnp.array(1.0))), 1.33, rtol=1e-13)


def test_a_progress_meter_shows_a_window_that_is_not_full(capfd):
    solver = pdx.ParallelSolver(
        dfx.Heun(), 16, progress_meter=dfx.TextProgressMeter(), policy=pdx.policies.Sequential()
    )
    sol = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: -y), solver, 0.0, 1.0, 0.1, jnp.ones(2), stepsize_controller=pdx.Windows()
    )
    sol.ys.block_until_ready()
    jax.effects_barrier()
    assert "100.00%" in capfd.readouterr().out
