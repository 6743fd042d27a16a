"""Whatever goes wrong is a failing result or a clear error, never a wrong trajectory called successful."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, only_full, parallel_solver, relative_difference


T1, NUM_STEPS = 10.0, 200
TS = jnp.linspace(0.0, T1, 9)
# The cheapest to compile, where neither the guess nor the policy is what is tested.
CHEAP = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}


def solve(field, windows=1, y0=DRIVEN_Y0, saveat=None, controller=dfx.ConstantStepSize(), args=DRIVEN_ARGS, **options):
    solver = parallel_solver(dfx.Bosh3(), NUM_STEPS, **options)
    saveat = dfx.SaveAt(t1=True, solver_state=True) if saveat is None else saveat
    return dfx.diffeqsolve(
        dfx.ODETerm(field), solver, 0.0, T1, T1 / windows, y0, args, saveat=saveat,
        stepsize_controller=controller, throw=False, max_steps=32,
    )  # fmt: skip


def sequential(field, y0=DRIVEN_Y0, t1=T1, num_steps=NUM_STEPS, **kw):
    return dfx.diffeqsolve(dfx.ODETerm(field), dfx.Bosh3(), 0.0, t1, t1 / num_steps, y0, DRIVEN_ARGS, **kw).ys


def nan_after_three(t, y, args):
    return jnp.where(t > 3, jnp.nan, -y + jnp.sin(t))


def blows_up(t, y, args):
    return y**2


def nan_everywhere(t, y, args):
    return jnp.full_like(y, jnp.nan)


def discontinuous(t, y, args):
    return jnp.where(y > 0, -1.0, 1.0) + jnp.cos(t)


def grows(t, y, args):
    return 7.0 * y


FIELDS = [nan_after_three, blows_up, nan_everywhere, discontinuous, grows]


@functools.cache
def compiled():
    """One program for all fields."""

    def chosen(t, y, which):
        return jnp.select([which == k for k in range(len(FIELDS))], [field(t, y, None) for field in FIELDS])

    subs = {"final": dfx.SubSaveAt(t1=True), "ts": dfx.SubSaveAt(ts=TS), "steps": dfx.SubSaveAt(steps=True)}
    return jax.jit(
        lambda which, windows, y0: solve(chosen, windows, y0, dfx.SaveAt(subs=subs, solver_state=True), args=which)
    )


def solve_compiled(field, windows=1, y0=DRIVEN_Y0):
    return compiled()(jnp.array(FIELDS.index(field)), jnp.array(float(windows)), y0)


def test_a_field_that_turns_nan_fails_and_the_windows_before_are_right():
    assert solve_compiled(nan_after_three).result == dfx.RESULTS.nonfinite
    sol = solve_compiled(nan_after_three, 4)
    assert sol.result == dfx.RESULTS.nonfinite
    want = sequential(nan_after_three, t1=2.5)
    assert relative_difference(sol.ys["steps"][0], want[0]) < 1e-12
    with pytest.raises(RuntimeError):
        dfx.diffeqsolve(dfx.ODETerm(nan_after_three), parallel_solver(dfx.Bosh3(), 50, **CHEAP), 0.0, T1, T1, DRIVEN_Y0)


def test_a_solution_that_blows_up_fails():
    sol = solve_compiled(blows_up, y0=jnp.array([0.5, 0.2]))
    assert sol.result == dfx.RESULTS.nonfinite


def test_a_field_that_is_nan_everywhere_fails():
    sol = solve_compiled(nan_everywhere)
    assert sol.result == dfx.RESULTS.nonfinite


def test_a_discontinuous_field_is_solved():
    sol = solve_compiled(discontinuous)
    assert sol.result == dfx.RESULTS.successful
    assert relative_difference(sol.ys["final"], sequential(discontinuous)) < 1e-9


def test_growth_over_many_orders_of_magnitude_is_accurate_at_its_start():
    y0 = jnp.array([1e-13, 1.0])
    sol = solve_compiled(grows, y0=y0)
    assert sol.result == dfx.RESULTS.successful
    np.testing.assert_allclose(sol.ys["ts"], sequential(grows, y0, saveat=dfx.SaveAt(ts=TS)), rtol=1e-9)


def test_under_a_pid_controller_a_nan_is_rejected_until_steps_run_out():
    controller = dfx.PIDController(rtol=1e-5, atol=1e-5)
    options = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelThenSequential()}
    sol = solve(nan_after_three, 4, controller=controller, **options)
    assert sol.result == dfx.RESULTS.max_steps_reached
    assert np.isfinite(sol.ys).all()


def test_outputs_and_events_in_the_part_that_failed_are_nan():
    def field(t, y, args):
        return jnp.where(y > 3, jnp.nan, y)

    ts = jnp.array([0.5, 0.9, 1.5, 2.0])
    options = {"saveat": dfx.SaveAt(ts=ts), "throw": False, "max_steps": 2}
    solver = parallel_solver(
        dfx.Bosh3(), 64, predictor=pdx.ConstantPredictor(), policy=pdx.policies.ParallelThenSequential()
    )
    sol = dfx.diffeqsolve(dfx.ODETerm(field), solver, 0.0, 2.0, 2.0, jnp.array(1.0), **options)
    assert sol.result == dfx.RESULTS.nonfinite
    np.testing.assert_allclose(sol.ys[:2], np.exp(ts[:2]), rtol=1e-5)
    assert np.isnan(sol.ys[2:]).all()
    event = dfx.Event(lambda t, y, args, **kwargs: t - 1.5, optx.Newton(1e-8, 1e-8))
    sol = dfx.diffeqsolve(dfx.ODETerm(field), solver, 0.0, 2.0, 2.0, jnp.array(1.0), event=event, throw=False)
    assert np.isnan(sol.ys).all()


@pytest.mark.parametrize("adjoint", [*only_full(dfx.DirectAdjoint()), pdx.ParallelAdjoint()], ids=["stock", "parallel"])
def test_the_derivative_of_a_failed_solve_is_nan_though_the_loss_masks_what_failed(adjoint):
    """`y' = a y^2`: of three components, or of three members of a batch, the second blows up at time 1."""

    def masked(a, y0):
        solver = parallel_solver(dfx.Bosh3(), 64, **CHEAP | {"policy": pdx.policies.ParallelThenSequential()})
        term = dfx.ODETerm(lambda t, y, a: a * y**2)
        sol = dfx.diffeqsolve(term, solver, 0.0, 2.0, 2.0, y0, a, max_steps=1, throw=False, adjoint=adjoint)
        return jnp.sum(jnp.where(jnp.isfinite(sol.ys), sol.ys, 0)), sol.result == dfx.RESULTS.successful

    y0 = jnp.array([0.1, 1.0, 0.2])
    gradient = jax.jit(jax.grad(masked, argnums=(0, 1), has_aux=True))
    (by_a, by_y0), ok = gradient(1.0, y0)
    assert not ok and np.isnan(by_a) and np.isnan(by_y0).all()

    by_a, ok = jax.jit(jax.vmap(jax.grad(masked, has_aux=True), in_axes=(None, 0)))(1.0, y0[:, None])
    assert ok.tolist() == [True, False, True]
    np.testing.assert_allclose(by_a[::2], 2 * y0[::2] ** 2 / (1 - 2 * y0[::2]) ** 2, rtol=1e-5)
    # Under Diffrax's own adjoints nobody can tell a failed window that the loss ignores from one that was rejected.
    assert np.isnan(by_a[1]) or isinstance(adjoint, dfx.DirectAdjoint)

    if isinstance(adjoint, pdx.ParallelAdjoint):
        _, tangent = jax.jit(lambda a: jax.jvp(lambda a: masked(a, y0)[0], (a,), (1.0,)))(1.0)
        assert np.isnan(tangent)


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")
def test_both_parts_of_a_complex_derivative_are_nan_if_the_solve_failed():
    def end(y0):
        term = dfx.ODETerm(lambda t, y, args: jnp.where(t > 0.5, jnp.nan, 1j * y))
        y = pdx.diffeqsolve(term, dfx.Heun(), 0.0, 1.0, 0.1, y0, throw=False).ys
        return jnp.sum(jnp.where(jnp.isfinite(y), y, 0)).real

    gradient = jax.jit(jax.grad(end))(jnp.array([1 + 2j]))
    assert np.isnan(gradient.real).all() and np.isnan(gradient.imag).all()


@pytest.mark.parametrize("begin", [0.0, *only_full(0.5)], ids=["at once", "with the second window"])
def test_the_derivative_is_nan_if_the_first_step_of_a_window_fails(begin):
    def end(y0, rate):
        # (A step is evaluated at both of its ends.)
        term = dfx.ODETerm(lambda t, y, rate: jnp.where(t > begin, jnp.nan, -rate * y))
        solver = pdx.ParallelSolver(dfx.Heun(), 4, policy=pdx.policies.ParallelThenSequential())
        return dfx.diffeqsolve(term, solver, 0.0, 1.0, 0.5, y0, rate, throw=False, max_steps=2).ys[-1, 0]

    for derivative in jax.jit(jax.grad(end, (0, 1)))(jnp.array([1.0, 2.0]), jnp.array(1.0)):
        assert np.all(np.isnan(derivative))


@pytest.mark.parametrize("dtype,size", [(np.float64, 1e16), *only_full((np.float32, 1e5))])
def test_a_large_component_that_nothing_depends_on_does_not_loosen_the_others(dtype, size):
    def field(t, y, args):
        lorenz = [10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]]
        return jnp.stack([*lorenz, jnp.ones_like(y[0])])

    @jax.jit
    def states(y0):
        t1 = jnp.asarray(5.0, dtype)
        solver = parallel_solver(dfx.Bosh3(), 512)
        return dfx.diffeqsolve(dfx.ODETerm(field), solver, 0 * t1, t1, t1, y0, max_steps=1).ys[0, :3]

    large, small = (states(jnp.array([1.0, 1.0, 1.0, clock], dtype)) for clock in (size, 0.0))
    assert relative_difference(large, small) < 1e4 * np.finfo(dtype).eps


@pytest.mark.parametrize(
    "solver,y0",
    [
        (dfx.Heun(), None),
        *only_full(
            (dfx.LeapfrogMidpoint(), {"a": None, "b": jnp.zeros(0)}),
            (dfx.ImplicitEuler(root_finder=optx.Newton(1e-6, 1e-6)), jnp.zeros((0, 2))),
        ),
    ],
    ids=["none", "stateful", "implicit"],
)
def test_a_state_without_numbers_is_solved_as_by_diffrax(solver, y0):
    def solve(solver, dt0, adjoint=dfx.RecursiveCheckpointAdjoint()):
        return dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: y), solver, 0.0, 1.0, dt0, y0, adjoint=adjoint, max_steps=4,
            saveat=dfx.SaveAt(t0=True, ts=[0.2, 0.7], t1=True, dense=True, solver_state=True),
        )  # fmt: skip

    want = solve(solver, 0.25)
    for adjoint in (dfx.RecursiveCheckpointAdjoint(), pdx.ParallelAdjoint()):
        got = solve(parallel_solver(solver, 2), 0.5, adjoint)
        assert got.result == dfx.RESULTS.successful
        assert eqx.tree_equal((got.ts, got.ys), (want.ts, want.ys))
        for sol in (got, pdx.refine(got)):
            assert eqx.tree_equal(sol.evaluate(0.3), want.evaluate(0.3))
        statistics = pdx.statistics(got)
        assert (int(statistics.windows), int(statistics.sequential_steps)) == (2, 0)
        # A solver state has numbers.
        assert int(statistics.iterations) == 0 or isinstance(solver, dfx.LeapfrogMidpoint)


def test_an_empty_state_is_solved_under_a_pid_controller_and_with_an_adaptive_predictor():
    solver = parallel_solver(dfx.Bosh3(), 4, predictor=pdx.AdaptivePredictor())
    term, controller = dfx.ODETerm(lambda t, y, args: y), dfx.PIDController(rtol=1e-3, atol=1e-3)
    # (Diffrax's own adjoints cannot save an empty tuple.)
    sol = dfx.diffeqsolve(
        term, solver, 0.0, 1.0, 0.1, (), stepsize_controller=controller, adjoint=pdx.ParallelAdjoint(), max_steps=8
    )
    assert sol.ys == () and sol.result == dfx.RESULTS.successful


def test_one_iteration_is_finished_in_sequence_with_the_right_answer():
    options = {"root_find_max_steps": 1, "predictor": pdx.ConstantPredictor()}
    sol = solve(DRIVEN.vector_field, **options)
    assert sol.result == dfx.RESULTS.successful
    assert relative_difference(sol.ys, sequential(DRIVEN.vector_field)) < 1e-12
    statistics = pdx.statistics(sol)
    assert int(statistics.sequential_steps) > NUM_STEPS // 2
    assert int(statistics.sequential_steps) + int(statistics.parallel_steps) == NUM_STEPS

    stuck = solve(DRIVEN.vector_field, policy=pdx.policies.ParallelOnly(), **options)
    assert stuck.result == dfx.RESULTS.nonlinear_max_steps_reached
    assert int(pdx.statistics(stuck).iterations) == 1


def test_a_term_that_does_not_fit_the_solver_is_refused_by_diffrax():
    with pytest.raises(ValueError, match="not compatible with solver"):
        dfx.diffeqsolve(DRIVEN, parallel_solver(dfx.SemiImplicitEuler(), 8), 0.0, 1.0, 1.0, DRIVEN_Y0, DRIVEN_ARGS)


def test_a_base_solver_without_an_error_estimate_is_refused_by_adaptive_controllers():
    controller = dfx.PIDController(rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="does not provide error estimates"):
        dfx.diffeqsolve(
            DRIVEN, parallel_solver(dfx.Euler(), 8), 0.0, 1.0, 1.0, DRIVEN_Y0, DRIVEN_ARGS,
            stepsize_controller=controller,
        )  # fmt: skip


@pytest.mark.parametrize("mode", [jax.grad, *only_full(jax.jacfwd)])
def test_states_that_no_policy_finished_have_a_derivative_of_nan_though_they_are_finite(mode):
    options = {**CHEAP, "root_finder": pdx.ParallelNewton(jacobian=pdx.jacobians.Zero()), "root_find_max_steps": 3}

    def loss(args):
        saveat = dfx.SaveAt(ts=TS, solver_state=True)
        field = lambda t, y, args: args * jnp.cos(y)
        solver = dfx.ForwardMode() if mode is jax.jacfwd else dfx.RecursiveCheckpointAdjoint()
        base = pdx.ParallelSolver(dfx.Bosh3(), NUM_STEPS, **options)
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field), base, 0.0, T1, T1, jnp.ones(1), args, saveat=saveat, adjoint=solver, throw=False
        )
        return jnp.sum(sol.ys), sol

    derivative, sol = jax.jit(mode(loss, has_aux=True))(jnp.array(0.5))
    assert sol.result == dfx.RESULTS.nonlinear_max_steps_reached and np.isfinite(sol.ys).all()
    assert np.isnan(derivative)
