"""What Diffrax users do with a solver works with `ParallelSolver`, with sequential Diffrax's values."""

import functools
import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, parallel_solver, relative_difference


T1, NUM_STEPS = 10.0, 240
# The cheapest to compile: where neither the guess nor the policy is what is tested.
CHEAP = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}


def parallel(
    saveat=dfx.SaveAt(t1=True), windows=1, solver=dfx.Bosh3(), options=CHEAP, y0=DRIVEN_Y0, args=DRIVEN_ARGS, t0=0.0, t1=T1,
    **kw,
):  # fmt: skip
    windowed = parallel_solver(solver, NUM_STEPS // windows, **options)
    kw = {"max_steps": windows + 1, "dt0": (t1 - t0) / windows, **kw}
    return dfx.diffeqsolve(DRIVEN, windowed, t0, t1, y0=y0, args=args, saveat=saveat, **kw)


def sequential(saveat=dfx.SaveAt(t1=True), solver=dfx.Bosh3(), y0=DRIVEN_Y0, args=DRIVEN_ARGS, t0=0.0, t1=T1, **kw):
    kw = {"max_steps": NUM_STEPS + 1, "dt0": (t1 - t0) / NUM_STEPS, **kw}
    return dfx.diffeqsolve(DRIVEN, solver, t0, t1, y0=y0, args=args, saveat=saveat, **kw)


TS = jnp.linspace(0.0, T1, 37)


def saved(t, y, args):
    return {"t": t, "y": args[0] * y}


def everything(t1):
    ts = t1 * jnp.linspace(0.0, 1.0, TS.size)
    return dfx.SaveAt(t0=True, t1=True, ts=ts, fn=saved, solver_state=True)


TRACES = []
END = jnp.array(T1)


@jax.jit
def by_default(y0, args, t1=END):
    """The solve of one window with every default."""
    TRACES.append(None)
    return parallel(everything(t1), options={}, y0=y0, args=args, t1=t1)


@jax.jit
def in_sequence(y0, args):
    """What it is compared to."""
    return sequential(everything(END), y0=y0, args=args, t1=END)


@functools.cache
def reference(t1):
    """The final state, to rounding."""
    return sequential(solver=dfx.Dopri8(), t1=t1, dt0=0.01, max_steps=round(100 * t1) + 1).ys


@pytest.mark.parametrize("windows", [1, 3])
def test_saving_at_times_and_with_a_function(windows):
    got = by_default(DRIVEN_Y0, DRIVEN_ARGS, END) if windows == 1 else parallel(everything(END), windows)
    want = in_sequence(DRIVEN_Y0, DRIVEN_ARGS)
    np.testing.assert_array_equal(got.ts, want.ts)
    assert relative_difference(got.ys["y"], want.ys["y"]) < 1e-12
    np.testing.assert_array_equal(got.ys["t"], want.ys["t"])


@pytest.mark.full
def test_batches_over_states_and_arguments():
    y0s = jnp.stack([DRIVEN_Y0, 2 * DRIVEN_Y0, -DRIVEN_Y0])
    args = jnp.stack([DRIVEN_ARGS, 1.2 * DRIVEN_ARGS, 0.7 * DRIVEN_ARGS])
    got = jax.jit(jax.vmap(by_default))(y0s, args)
    for k in range(3):
        assert relative_difference(got.ys["y"][k], in_sequence(y0s[k], args[k]).ys["y"]) < 1e-12
    # A member does what it does alone: the same iterations, the same steps.
    alone = by_default(y0s[1], args[1], END)
    for together, single in zip(jax.tree.leaves(got.solver_state), jax.tree.leaves(alone.solver_state)):
        np.testing.assert_allclose(together[1], single, rtol=0.5, atol=1e-14)
    assert int(pdx.statistics(got).iterations[1]) == int(pdx.statistics(alone).iterations)


def test_saving_steps_sees_the_ends_of_windows_and_times_may_be_integers():
    got = parallel(dfx.SaveAt(steps=True), windows=4, t0=0, t1=10)
    want = in_sequence(DRIVEN_Y0, DRIVEN_ARGS)
    # The ends of the four windows; before them is the initial time.
    ends = 1 + 9 * np.arange(1, 5)
    assert got.ts.dtype == want.ts.dtype
    np.testing.assert_allclose(got.ts[:4], want.ts[ends])
    assert relative_difference(got.ys[:4], want.ys["y"][ends] / DRIVEN_ARGS[0]) < 1e-12
    assert np.isinf(got.ys[4:]).all()


def test_dense_output_and_its_derivative():
    got, want = (solve(dfx.SaveAt(dense=True), solver=dfx.Tsit5()) for solve in (parallel, sequential))
    times = jnp.linspace(0.0, T1, 101)
    assert relative_difference(jax.vmap(got.evaluate)(times), jax.vmap(want.evaluate)(times)) < 1e-12
    assert relative_difference(got.evaluate(1.0, 2.5), want.evaluate(1.0, 2.5)) < 1e-12
    assert relative_difference(jax.vmap(got.derivative)(times[1:]), jax.vmap(want.derivative)(times[1:])) < 1e-10


def test_dense_output_is_of_the_order_of_the_base_solver_between_fine_steps():
    exact = sequential(dfx.SaveAt(ts=TS), solver=dfx.Dopri8()).ys
    solver = parallel_solver(dfx.Bosh3(), 30, **CHEAP)

    # One window or two, of 30 steps each: one program, two step sizes.
    @jax.jit
    def error(window):
        saveat = dfx.SaveAt(ts=TS)
        sol = dfx.diffeqsolve(DRIVEN, solver, 0.0, T1, window, DRIVEN_Y0, DRIVEN_ARGS, saveat=saveat, max_steps=2)
        return jnp.max(jnp.abs(sol.ys - exact))

    errors = [float(error(jnp.array(T1 / windows))) for windows in (1, 2)]
    assert 2.5 < np.log2(errors[0] / errors[1]) < 4.5


def test_backward_time_and_an_empty_span():
    @jax.jit
    def solve(ts, t0, t1, dt0):
        return parallel(dfx.SaveAt(ts=ts), t0=t0, t1=t1, dt0=dt0)

    zero, end = jnp.array(0.0), jnp.array(T1)
    got, want = solve(TS[::-1], end, zero, -end), sequential(dfx.SaveAt(ts=TS[::-1]), t0=T1, t1=0.0)
    np.testing.assert_array_equal(got.ts, want.ts)
    assert relative_difference(got.ys, want.ys) < 1e-12
    two = jnp.array(2.0)
    empty = solve(jnp.full(TS.shape, two), two, two, jnp.array(1.0))
    np.testing.assert_array_equal(empty.ys, jnp.broadcast_to(DRIVEN_Y0, empty.ys.shape))


def test_batches_over_states_alone():
    y0s = jnp.stack([DRIVEN_Y0, 2 * DRIVEN_Y0])
    got = jax.jit(jax.vmap(lambda y0: parallel(y0=y0).ys[-1]))(y0s)
    want = jnp.stack([in_sequence(y0, DRIVEN_ARGS).ys["y"][-1] for y0 in y0s]) / DRIVEN_ARGS[0]
    assert relative_difference(got, want) < 1e-12


def test_step_to_makes_a_window_of_each_interval():
    ends = jnp.array([0.0, 1.0, 4.0, T1])
    saveat = dfx.SaveAt(ts=TS, solver_state=True)
    solver = parallel_solver(dfx.Bosh3(), 60, **CHEAP)
    got = dfx.diffeqsolve(
        DRIVEN, solver, 0.0, T1, None, DRIVEN_Y0, DRIVEN_ARGS, saveat=saveat, stepsize_controller=dfx.StepTo(ends)
    )
    fine = jnp.concatenate([jnp.linspace(a, b, 61)[1:] for a, b in itertools.pairwise(ends)])
    want = sequential(dfx.SaveAt(ts=TS), dt0=None, stepsize_controller=dfx.StepTo(jnp.concatenate([ends[:1], fine])))
    assert relative_difference(got.ys, want.ys) < 1e-12
    assert int(pdx.statistics(got).windows) == 3


def test_pid_controllers_honour_the_tolerance():
    for rtol, first in ((1e-4, None), (1e-9, 60.0)):
        controller = dfx.PIDController(rtol=rtol, atol=rtol)
        root_finder = dfx.with_stepsize_controller_tols(pdx.ParallelNewton)() if first is None else pdx.ParallelNewton()
        # Once with a predictor and a policy that are cheap to compile, once with the default ones.
        cheap = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelThenSequential()}
        solver = parallel_solver(dfx.Tsit5(), 64, root_finder=root_finder, **(cheap if first is None else {}))
        saveat = dfx.SaveAt(t1=True, solver_state=True)
        sol = dfx.diffeqsolve(
            DRIVEN, solver, 0.0, 60.0, first, DRIVEN_Y0, DRIVEN_ARGS, saveat=saveat, stepsize_controller=controller
        )
        assert sol.result == dfx.RESULTS.successful
        # Error per step is controlled, so the error at the end is a moderate multiple of the tolerance.
        assert relative_difference(sol.ys, reference(60.0)) < 100 * rtol
        if first is not None:
            assert int(sol.stats["num_rejected_steps"]) > 0
        assert int(pdx.statistics(sol).sequential_steps) == 0


def test_a_window_that_does_not_converge_is_rejected_and_retried_shorter():
    # From a constant guess, no window of 60 time units converges in four iterations; short ones do.
    solver = parallel_solver(
        dfx.Tsit5(), 64, predictor=pdx.ConstantPredictor(), root_find_max_steps=4, policy=pdx.policies.ParallelOnly()
    )
    controller = dfx.PIDController(rtol=1e-3, atol=1e-3)
    saveat = dfx.SaveAt(t1=True, solver_state=True)
    sol = dfx.diffeqsolve(
        DRIVEN, solver, 0.0, 60.0, 60.0, DRIVEN_Y0, DRIVEN_ARGS, saveat=saveat, stepsize_controller=controller
    )
    assert sol.result == dfx.RESULTS.successful
    assert int(sol.stats["num_rejected_steps"]) > 0
    assert int(pdx.statistics(sol).sequential_steps) == 0
    assert relative_difference(sol.ys, reference(60.0)) < 1e-2


@pytest.mark.parametrize("dtype, small", [(jnp.float32, 1e-32), (jnp.float64, 1e-300)])
def test_states_whose_rounding_errors_underflow_are_solved_in_parallel(dtype, small):
    @jax.jit
    def solve(size):
        term, t1 = dfx.ODETerm(lambda t, y, args: -y), jnp.array(1.0, dtype)
        solver = parallel_solver(dfx.Heun(), 8)
        return dfx.diffeqsolve(term, solver, 0 * t1, t1, t1, size, saveat=dfx.SaveAt(t1=True, solver_state=True))

    tiny, plain = solve(jnp.array(small, dtype)), solve(jnp.array(1, dtype))
    assert int(pdx.statistics(tiny).sequential_steps) == 0
    np.testing.assert_allclose(tiny.ys / small, plain.ys, rtol=1e-5)


def test_states_may_be_pytrees_of_mixed_precision_with_empty_leaves():
    def field(t, y, args):
        return {"a": -y["a"] * y["b"][0].astype(jnp.float32), "b": (jnp.sin(y["b"][0]),), "c": None}

    y0 = {"a": jnp.ones((2, 2), jnp.float32), "b": (jnp.array(0.3),), "c": None}
    time = jnp.array(5.0, jnp.float32)
    got, want = (
        dfx.diffeqsolve(dfx.ODETerm(field), solver, 0.0 * time, time, dt0, y0).ys
        for solver, dt0 in (
            (parallel_solver(dfx.Bosh3(), 100, policy=pdx.policies.ParallelOnly()), time),
            (dfx.Bosh3(), time / 100),
        )
    )
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert g.dtype == w.dtype
        assert relative_difference(g, w) < 1e-5


def test_a_second_solve_with_other_numbers_does_not_compile_again():
    by_default(DRIVEN_Y0, DRIVEN_ARGS, END)
    traces = len(TRACES)
    for k in range(1, 3):
        by_default(DRIVEN_Y0 + k, k * DRIVEN_ARGS, END - k)
    assert len(TRACES) == traces


def test_solutions_of_the_same_problem_have_the_same_structure():
    # Traced, and not compiled.
    def structure(y0):
        return eqx.filter_eval_shape(lambda y0: parallel(dfx.SaveAt(dense=True), options={}, y0=y0), y0)

    a, b = structure(DRIVEN_Y0), structure(2 * DRIVEN_Y0)
    assert jax.tree.structure(a) == jax.tree.structure(b)
