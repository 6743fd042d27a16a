"""Under an adaptive step-size controller the default makes Diffrax's own steps, in one loop: the same values, counts and
results, and the same derivatives; in windows whatever the solver's wrapper."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx
from parallel_diffrax._ode import _compat, _controlled_steps, _controlled_window
from parallel_diffrax._recurrence import _replayed_derivative

from .problems import fitzhugh_nagumo, only_full


TERM = dfx.ODETerm(lambda t, y, args: fitzhugh_nagumo(t, y) * args)
Y0, T1 = jnp.array([1.0, 0.5]), 20.0
LOOSE = dfx.PIDController(rtol=1e-4, atol=1e-6)


def end(solve, rate, solver=dfx.Tsit5(), term=TERM, y0=Y0, t0=0.0, t1=T1, dt0=None, controller=LOOSE, **options):
    return solve(term, solver, t0, t1, dt0, y0, rate, stepsize_controller=controller, **options)


def wrapped(term, solver, *args, **options):
    """Diffrax's function, with nothing but the solver changed."""
    return dfx.diffeqsolve(term, pdx.ParallelSolver(solver), *args, **options)


def counts(sol):
    return int(sol.stats["num_accepted_steps"]), int(sol.stats["num_rejected_steps"])


def close(got, want, tolerance=1e-11):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


SPLIT = dfx.MultiTerm(TERM, dfx.ODETerm(lambda t, y, args: -0.1 * y))
CASES = {
    "explicit": {},
    "explicit, without reuse of stages": {"solver": dfx.Ralston(), "controller": dfx.PIDController(1e-3, 1e-4)},
    "implicit": {"solver": dfx.Kvaerno3()},
    "step doubling": {"solver": dfx.HalfSolver(dfx.Heun()), "controller": dfx.PIDController(1e-2, 1e-3)},
    "PI control": {"controller": dfx.PIDController(1e-4, 1e-6, pcoeff=0.2, icoeff=0.4)},
    "largest step": {"controller": dfx.PIDController(1e-3, 1e-3, dtmax=0.5)},
    "smallest step, forced": {"controller": dfx.PIDController(1e-8, 1e-8, dtmin=0.2)},
    "clipped": {"controller": dfx.ClipStepSizeController(LOOSE, step_ts=jnp.array([3.3]), jump_ts=jnp.array([5.0]))},
    "backward in time": {"t0": 2.0, "t1": 0.0},
    "a first step": {"dt0": 0.3},
}


@pytest.mark.parametrize("name", [*list(CASES)[:5], *only_full(*list(CASES)[5:])])
def test_the_front_door_makes_the_steps_of_diffrax(name):
    saveat = dfx.SaveAt(ts=jnp.linspace(CASES[name].get("t0", 0.0), CASES[name].get("t1", T1), 4), t1=True)
    ours, theirs = (
        jax.jit(lambda rate, solve=solve: end(solve, rate, saveat=saveat, **CASES[name]))(1.0)
        for solve in (pdx.diffeqsolve, dfx.diffeqsolve)
    )
    assert counts(ours) == counts(theirs) and counts(ours)[0] > 3
    assert int(pdx.statistics(ours).sequential_steps) == counts(ours)[0]
    assert int(pdx.statistics(ours).rejected_steps) == counts(ours)[1]
    # Between steps, the stages of an implicit step are solved once more, and more accurately.
    close(ours.ys, theirs.ys, 1e-9 if name != "implicit" else 1e-7)


def test_derivatives_are_those_of_the_accepted_steps_in_both_modes():
    loss = lambda solve, **options: lambda rate: end(solve, rate, t1=5.0, **options).ys[-1, 0]
    rate = jnp.array(1.0)
    want = jax.jit(jax.grad(loss(dfx.diffeqsolve)))(rate)
    close(jax.jit(jax.grad(loss(pdx.diffeqsolve)))(rate), want)
    ours = jax.jit(lambda rate, tangent: jax.jvp(loss(pdx.diffeqsolve), (rate,), (tangent,))[1])
    close(ours(rate, jnp.array(2.0)), 2 * want)


def test_derivatives_for_times_and_outputs():
    ts = jnp.array([1.0, 2.5])

    def loss(solve, t1, y0):
        sol = end(solve, 1.0, y0=y0, t1=t1, saveat=dfx.SaveAt(ts=ts, t1=True))
        return jnp.sum(sol.ys**2 * jnp.array([[1.0], [2.0], [3.0]]))

    t1 = jnp.array(4.0)
    of_t1, of_y0 = jax.jit(jax.grad(lambda *x: loss(pdx.diffeqsolve, *x), (0, 1)))(t1, Y0)
    sol = end(dfx.diffeqsolve, 1.0, t1=t1)
    close(of_t1, 6 * sol.ys[-1] @ fitzhugh_nagumo(t1, sol.ys[-1]), 1e-3)
    close(of_y0, jax.jit(jax.grad(lambda y0: loss(dfx.diffeqsolve, t1, y0)))(Y0), 1e-9)


def test_a_batch_makes_the_steps_of_each_member_alone():
    rates = jnp.array([0.1, 1.0, 3.0])
    solve = lambda rate: end(pdx.diffeqsolve, rate)
    together = jax.jit(jax.vmap(solve))(rates)
    alone = [jax.jit(solve)(rate) for rate in rates]
    close(together.ys, jnp.stack([sol.ys for sol in alone]), 1e-13)
    np.testing.assert_array_equal(together.stats["num_steps"], [sol.stats["num_steps"] for sol in alone])


@pytest.mark.full
def test_the_gradient_of_each_member_of_a_batch_is_that_of_the_member_alone():
    rates, value = jnp.array([0.1, 1.0, 3.0]), lambda rate: end(pdx.diffeqsolve, rate).ys[-1, 0]
    got, want = jax.jit(jax.vmap(jax.grad(value)))(rates), [jax.jit(jax.grad(value))(rate) for rate in rates]
    close(got, jnp.stack(want), 1e-13)


def test_the_gradient_of_a_batch_of_steps_that_are_not_made_in_scalars():
    term = dfx.ODETerm(lambda t, y, rate: -rate * y[::-1])
    y0 = jnp.linspace(0.5, 1.5, 27).reshape(3, 9)

    def gradient(solve):
        one = lambda y0, rate: (
            solve(term, dfx.Heun(), 0.0, 1.0, None, y0, rate, stepsize_controller=dfx.PIDController(1e-3, 1e-3)).ys
        )
        return jax.jit(jax.grad(lambda rate: jnp.sum(jax.vmap(one, (0, None))(y0, rate) ** 2)))(jnp.array(0.7))

    close(gradient(pdx.diffeqsolve), gradient(dfx.diffeqsolve), 1e-12)


# A field of so many operations that a step is not made in scalars: its stages are kept for outputs.
NETWORK = 0.2 * jax.random.normal(jax.random.key(3), (200, 2))
COSTLY = dfx.ODETerm(lambda t, y, rate: fitzhugh_nagumo(t, y) + rate * jnp.tanh(NETWORK.T @ jnp.tanh(NETWORK @ y)))


def costly(solve, rate, y0=Y0, t1=T1, ts=(0.0, 0.1, 0.2, 7.0, 7.0, 19.0, 20.0), **options):
    """Outputs at both ends, twice at the same time, and several in a step."""
    saveat = dfx.SaveAt(ts=t1 / T1 * jnp.array(ts), t1=True)
    return end(solve, rate, term=COSTLY, y0=y0, t1=t1, saveat=saveat, max_steps=256, **options)


def costly_loss(solve, rate, y0=Y0, t1=T1, **options):
    ys = costly(solve, rate, y0, t1, **options).ys
    return jnp.sum(ys[:-1] ** 2 * jnp.arange(1.0, 8.0)[:, None]) + jnp.sum(ys[-1] ** 3)


COSTLY_CASES = {
    "last stage reused": {},
    "no stage reused": {"solver": dfx.Ralston(), "controller": dfx.PIDController(1e-3, 1e-4)},
    "clipped": CASES["clipped"],
}


@pytest.mark.parametrize("name", ["last stage reused", *only_full("no stage reused", "clipped")])
def test_the_stages_of_costly_steps_are_kept_for_outputs(short_segments, monkeypatch, name):
    made = []
    of = _controlled_window.StepWithStages.of
    monkeypatch.setattr(_controlled_window.StepWithStages, "of", lambda step: made.append(step) or of(step))
    # (Given times move the steps with the end, which they do not in Diffrax.)
    argnums = (0, 1) if name == "clipped" else (0, 1, 2)
    loss = lambda solve: functools.partial(costly_loss, solve, **COSTLY_CASES[name])
    derivative = lambda solve: jax.value_and_grad(loss(solve), argnums)
    args = jnp.array([0.5, 0.6]), jnp.stack([Y0, -Y0]), jnp.array(T1)
    both = [jax.jit(jax.vmap(derivative(solve), (0, 0, None)))(*args) for solve in (pdx.diffeqsolve, dfx.diffeqsolve)]
    assert made
    jax.tree.map(lambda got, want: close(got, want, 1e-8), *both)


@pytest.mark.full
def test_the_stages_of_costly_steps_have_derivatives_of_any_kind(short_segments):
    forward = lambda solve, rate: jax.jvp(functools.partial(costly_loss, solve), (rate,), (jnp.ones(()),))[1]
    rate = jnp.array(0.5)
    ours, theirs = (
        jax.jit(functools.partial(forward, solve))
        for solve in (pdx.diffeqsolve, functools.partial(dfx.diffeqsolve, adjoint=dfx.ForwardMode()))
    )
    close(ours(rate), theirs(rate), 1e-8)
    # Steps are constants: where their number does not change, differences of the gradient are the second derivative.
    second = jax.jit(jax.grad(jax.grad(functools.partial(costly_loss, pdx.diffeqsolve, t1=2.0))))
    dense = end(dfx.diffeqsolve, rate, term=COSTLY, t1=2.0, saveat=dfx.SaveAt(steps=True), max_steps=64)
    steps = dfx.StepTo(jnp.concatenate([jnp.zeros(1), dense.ts[jnp.isfinite(dense.ts)]]))
    want = jax.jit(
        jax.jacfwd(
            jax.jacfwd(
                lambda rate: costly_loss(dfx.diffeqsolve, rate, t1=2.0, controller=steps, adjoint=dfx.ForwardMode())
            )
        )
    )
    close(second(rate), want(rate), 1e-8)


@pytest.fixture(scope="module")
def only_the_solver_changed():
    saveat = dfx.SaveAt(t1=True, solver_state=True)
    return lambda rate, **options: jax.jit(lambda rate: end(wrapped, rate, saveat=saveat, **options))(rate)


def test_with_only_the_solver_changed_windows_grow_and_make_the_same_work(only_the_solver_changed):
    sol = only_the_solver_changed(1.0)
    theirs = end(dfx.diffeqsolve, 1.0)
    statistics = pdx.statistics(sol)
    assert int(statistics.windows) <= 5 and counts(sol)[1] == 0
    made = int(statistics.sequential_steps) + int(statistics.rejected_steps)
    # Each window cuts one step short.
    assert abs(made - int(theirs.stats["num_steps"])) <= 2 * int(statistics.windows)
    exact = end(dfx.diffeqsolve, 1.0, controller=dfx.PIDController(1e-10, 1e-12)).ys
    assert np.max(np.abs(sol.ys - exact)) <= 2 * np.max(np.abs(theirs.ys - exact))


def test_a_window_with_room_for_few_steps_is_retried_shorter_and_fits_then():
    solver, tight = pdx.ParallelSolver(dfx.Tsit5(), num_steps=16), dfx.PIDController(1e-7, 1e-9)
    saveat = dfx.SaveAt(t1=True, solver_state=True)
    sol = jax.jit(lambda rate: end(dfx.diffeqsolve, rate, solver, controller=tight, saveat=saveat))(1.0)
    theirs = end(dfx.diffeqsolve, 1.0, controller=tight)
    statistics = pdx.statistics(sol)
    made = int(statistics.sequential_steps) + int(statistics.rejected_steps)
    assert made <= 1.5 * int(theirs.stats["num_steps"])
    # Few windows are rejected, and the others are nearly full.
    assert counts(sol)[1] <= 0.3 * counts(sol)[0] and made >= 6 * int(statistics.windows)
    close(sol.ys, theirs.ys, 1e-5)


def test_a_failure_is_the_result_and_has_no_derivative():
    stiff = {"controller": dfx.PIDController(1e-10, 1e-10, dtmin=0.5, force_dtmin=False)}
    for solve in (pdx.diffeqsolve, wrapped):
        sol = end(solve, 1.0, throw=False, **stiff)
        assert sol.result == dfx.RESULTS.dt_min_reached, solve


def test_a_solve_without_enough_steps_keeps_what_it_has_and_says_so():
    saveat = dfx.SaveAt(ts=jnp.linspace(0.0, T1, 7), t1=True)
    ours, theirs = (
        end(solve, 1.0, max_steps=10, throw=False, saveat=saveat) for solve in (pdx.diffeqsolve, dfx.diffeqsolve)
    )
    assert ours.result == theirs.result == dfx.RESULTS.max_steps_reached
    close(ours.ts, theirs.ts)
    close(ours.ys, theirs.ys)
    with pytest.raises(Exception, match="max_steps"):
        end(pdx.diffeqsolve, 1.0, max_steps=10)


def test_a_step_that_overflows_is_rejected():
    # The first step is so long that its stages overflow. Diffrax itself then never shortens it.
    term = dfx.ODETerm(lambda t, y, args: -(y**3))
    sol = end(pdx.diffeqsolve, 1.0, term=term, y0=jnp.array([1.0]), dt0=1e200, t1=1e200, max_steps=2000, throw=False)
    assert counts(sol)[0] > 0


def test_a_solver_state_serves_solves_with_any_controller():
    # Outside of a solve, `init` knows no controller.
    assert _compat.current_solve() is None
    solver, saveat = pdx.ParallelSolver(dfx.Tsit5()), dfx.SaveAt(t1=True, solver_state=True)
    fixed = {"controller": dfx.ConstantStepSize(), "dt0": 0.05}
    span, want = 2.0, Y0
    state = jax.jit(lambda: solver.init(TERM, 0.0, span, Y0, 1.0))()
    for k, options in enumerate([{}, fixed, {}, fixed]):
        times = {"t0": k * span, "t1": (k + 1) * span}
        sol = end(dfx.diffeqsolve, 1.0, solver, y0=want, saveat=saveat, solver_state=state, **times, **options)
        want = end(dfx.diffeqsolve, 1.0, y0=want, controller=dfx.PIDController(1e-9, 1e-9), **times).ys[-1]
        close(sol.ys[-1], want, 1e-3)
        state = sol.solver_state
    assert int(pdx.statistics(sol).sequential_steps) > 80


def test_constant_steps_are_those_of_the_user():
    solve = lambda fn: jax.jit(lambda rate: fn(TERM, dfx.Tsit5(), 0.0, 2.0, 0.1, Y0, rate))(1.0)
    ours, theirs = solve(wrapped), solve(dfx.diffeqsolve)
    assert counts(ours) == counts(theirs) == (20, 0)
    close(ours.ys, theirs.ys, 1e-14)


@eqx.filter_jit
def _pulse(solve, controller, rate):
    field = lambda t, y, args: jnp.where((t >= 1) & (t < 2), 50 * args, 0.0) - y
    return solve(dfx.ODETerm(field), dfx.Tsit5(), 0.0, 3.0, None, jnp.zeros(1), rate, stepsize_controller=controller)


@pytest.mark.parametrize("jump_ts", [None, jnp.array([1.0, 2.0])], ids=["not told", "told"])
def test_a_jump_of_the_field_costs_what_it_costs_diffrax(jump_ts):
    controller = dfx.PIDController(1e-6, 1e-8)
    controller = controller if jump_ts is None else dfx.ClipStepSizeController(controller, jump_ts=jump_ts)
    ours, theirs = (_pulse(solve, controller, 1.0) for solve in (pdx.diffeqsolve, dfx.diffeqsolve))
    assert counts(ours) == counts(theirs)
    close(ours.ys, theirs.ys)


def test_the_derivative_for_the_time_of_a_jump_is_that_of_the_solution():
    def value(solve, jump):
        term = dfx.ODETerm(lambda t, y, args: jnp.where(t < jump, args, -args) * y)
        controller = dfx.ClipStepSizeController(LOOSE, jump_ts=jump[None])
        return end(solve, 1.0, term=term, y0=jnp.ones(1), t1=2.0, controller=controller).ys[-1, 0]

    got = jax.jit(jax.grad(lambda jump: value(pdx.diffeqsolve, jump)))(jnp.array(1.2))
    # The value is exp(2 jump - 2).
    close(got, 2 * np.exp(0.4), 1e-4)


def test_a_first_step_in_the_wrong_direction_is_an_error():
    with pytest.raises(Exception, match="dt0 >= 0"):
        end(pdx.diffeqsolve, 1.0, dt0=-0.1)


def test_a_window_that_is_accepted_before_its_end_is_reached_fails():
    # A window of the smallest length is accepted in any case, and this one has no room for a second trial.
    solver, controller = pdx.ParallelSolver(dfx.Tsit5(), num_steps=2), dfx.PIDController(1e-9, 1e-9, dtmin=1.0)
    sol = end(dfx.diffeqsolve, 1.0, solver, controller=controller, throw=False)
    assert sol.result == dfx.RESULTS.max_steps_reached


def test_a_step_that_the_end_of_a_window_cut_short_does_not_have_the_next_one_accepted():
    """Steps of 0.1 and 1, then one of 10, which is cut to 0.001: less than the smallest step, which is always accepted."""
    term = dfx.ODETerm(lambda t, y, args: -args * y)
    solver, saveat = pdx.ParallelSolver(dfx.Tsit5()), dfx.SaveAt(t1=True, solver_state=True)
    call = {"controller": dfx.PIDController(1e-6, 1e-8, dtmin=0.01), "y0": jnp.ones(1), "term": term, "saveat": saveat}
    state = eqx.filter_jit(lambda: solver.init(term, 0.0, 0.1, jnp.ones(1), 0.0))()
    sol = end(dfx.diffeqsolve, 0.0, solver, t1=1.101, dt0=0.1, solver_state=state, **call)
    sol = end(dfx.diffeqsolve, 1.0, solver, t0=1.101, t1=16.101, dt0=15.0, solver_state=sol.solver_state, **call)
    np.testing.assert_allclose(sol.ys[-1], np.exp(-15.0), atol=1e-7)


@jax.custom_vjp
def _reverse_only(y):
    return jnp.sin(y)


_reverse_only.defvjp(lambda y: (jnp.sin(y), y), lambda y, c: (jnp.cos(y) * c,))


@pytest.mark.parametrize("solve", [pdx.diffeqsolve, *only_full(wrapped)], ids=["front door", "only the solver changed"])
def test_fields_without_forward_mode_have_a_gradient(solve):
    term = dfx.ODETerm(lambda t, y, args: args * _reverse_only(y))
    loss = lambda solve: lambda rate, t1: jnp.sum(end(solve, rate, term=term, t1=t1, max_steps=64).ys ** 2)
    got, want = (jax.jit(jax.grad(loss(fn), (0, 1)))(1.0, 2.0) for fn in (solve, dfx.diffeqsolve))
    close(got, want, 1e-11 if solve is pdx.diffeqsolve else 1e-3)


def test_times_may_have_less_precision_than_states():
    t0, t1 = jnp.zeros((), jnp.float32), jnp.array(2.0, jnp.float32)
    term = dfx.ODETerm(lambda t, y, args: -args * y)
    with jax.numpy_dtype_promotion("strict"):
        ours, theirs = (end(solve, 1.0, term=term, t0=t0, t1=t1) for solve in (pdx.diffeqsolve, dfx.diffeqsolve))
    close(ours.ys, theirs.ys, 1e-14)


@pytest.mark.full
def test_several_windows_have_a_gradient_through_the_parallel_adjoint():
    loss = lambda solve, **options: lambda rate: end(solve, rate, t1=2.0, max_steps=16, **options).ys[-1, 0]
    got = jax.jit(jax.grad(loss(wrapped, adjoint=pdx.ParallelAdjoint())))(1.0)
    close(got, jax.jit(jax.grad(loss(wrapped)))(1.0), 1e-11)


def test_a_given_step_time_at_which_the_field_jumps_has_the_derivative_of_the_solution():
    """A step that ends at `step_ts` has a stage that sees the field after the jump (`jump_ts` would avoid that)."""

    @eqx.filter_jit
    def integral(time, solve):
        term = dfx.ODETerm(lambda t, y, args: (jnp.where(t < time, 0.0, 1.0) - y[0], y[0]))
        controller = dfx.ClipStepSizeController(dfx.PIDController(1e-8, 1e-8), step_ts=time[None])
        y0 = (jnp.array(1.0), jnp.array(0.0))
        return solve(term, dfx.Tsit5(), 0.0, 1.0, None, y0, stepsize_controller=controller).ys[1][0]

    for solve in (pdx.diffeqsolve, wrapped):
        gradient = jax.grad(integral)(jnp.array(0.5), solve)
        np.testing.assert_allclose(gradient, np.exp(-0.5) - 1, rtol=1e-5)


@pytest.mark.parametrize("solve", [pdx.diffeqsolve, *only_full(wrapped)])
def test_a_healthy_solve_and_its_gradient_have_no_nan_on_their_way(solve):
    with jax.debug_nans(True):
        sol = end(solve, 1.0, t1=1.0)
        gradient = jax.jit(jax.grad(lambda rate: end(solve, rate, t1=1.0).ys[-1, 0]))(1.0)
    assert np.all(np.isfinite(sol.ys)) and np.isfinite(gradient)


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of 8 steps, so that small solves have several."""
    monkeypatch.setattr(_controlled_steps, "_SEGMENT", 8)
    monkeypatch.setattr(_replayed_derivative, "_SEGMENT", 8)


@pytest.mark.parametrize("solver", [dfx.Tsit5(), *only_full(dfx.Kvaerno3())], ids=["explicit", "implicit"])
def test_solves_of_several_segments_are_those_of_diffrax(short_segments, solver):
    # Outputs in every segment, at both ends, and twice at the same time.
    ts, weights = jnp.array([0.0, 2.0, 2.0, 7.0, 19.9, 20.0]), jnp.arange(1.0, 7.0)[:, None]
    saveat, y0s = dfx.SaveAt(ts=ts, t1=True), jnp.stack([Y0, -Y0, 0.1 * Y0])

    def loss(solve, y0, rate, t1):
        sol = end(solve, rate, solver=solver, y0=y0, t1=t1, saveat=saveat, max_steps=301)
        return jnp.sum(sol.ys[:-1] ** 2 * weights) + jnp.sum(sol.ys[-1] ** 3), (sol.ys, counts_of(sol))

    def both(solve):
        gradient = jax.value_and_grad(lambda *args: loss(solve, *args), argnums=(0, 1, 2), has_aux=True)
        return jax.jit(jax.vmap(gradient, in_axes=(0, None, None)))(y0s, jnp.array(1.3), jnp.array(T1))

    ((value, (ys, made)), gradient), ((want, (want_ys, want_made)), want_gradient) = map(
        both, (pdx.diffeqsolve, dfx.diffeqsolve)
    )
    np.testing.assert_array_equal(made, want_made)
    assert np.all(np.asarray(made) > 24)  # more than three segments
    tolerance = 1e-9 if solver == dfx.Tsit5() else 1e-5
    close(ys, want_ys, tolerance)
    close(value, want, tolerance)
    jax.tree.map(lambda got, want: close(got, want, tolerance), gradient[:2], want_gradient[:2])
    # (For the end, only the last step becomes longer. Diffrax differentiates the lengths of all.)
    close(gradient[2], want_gradient[2], 1e-2)
    tangent = jax.jit(lambda y0: jax.jvp(lambda y0: loss(pdx.diffeqsolve, y0, 1.3, T1)[0], (y0,), (Y0,))[1])(Y0)
    close(tangent, gradient[0][0] @ Y0, tolerance)


def counts_of(sol):
    return sol.stats["num_accepted_steps"]


@pytest.mark.full
def test_the_second_derivative_of_several_segments(short_segments):
    def loss(rate):
        saveat, controller = dfx.SaveAt(ts=jnp.array([2.0, 5.0])), dfx.PIDController(1e-9, 1e-9)
        return jnp.sum(end(pdx.diffeqsolve, rate, t1=5.0, saveat=saveat, controller=controller, max_steps=256).ys ** 2)

    first, second, step = jax.jit(jax.grad(loss)), jax.jit(jax.grad(jax.grad(loss))), 1e-4
    close(second(jnp.array(1.0)), (first(1.0 + step) - first(1.0 - step)) / (2 * step), 1e-6)


EVENTS = {
    "a float": (lambda t, y, args, **kwargs: y[0] + 0.5, None),
    "upwards": (lambda t, y, args, **kwargs: y[0] + 0.5, True),
    "a boolean": (lambda t, y, args, **kwargs: y[1] > 1.0, None),
    "two": ((lambda t, y, args, **kwargs: t - 30.0, lambda t, y, args, **kwargs: args * y[0] + 0.5), None),
    "never": (lambda t, y, args, **kwargs: y[0] - 9.0, None),
}


@pytest.mark.parametrize("located", [True, *only_full(False)], ids=["located", "at the end of a step"])
@pytest.mark.parametrize("name", [*list(EVENTS)[:1], *only_full(*list(EVENTS)[1:])])
def test_an_event_ends_the_loop_after_the_steps_of_diffrax(short_segments, name, located):
    cond_fn, direction = EVENTS[name]
    event = dfx.Event(cond_fn, optx.Newton(1e-10, 1e-10) if located else None, direction)
    saveat = dfx.SaveAt(ts=jnp.linspace(0.0, T1, 9), t1=True)

    def solve(call, rate):
        sol = end(call, rate, event=event, saveat=saveat)
        return jnp.sum(jnp.where(jnp.isfinite(sol.ys), sol.ys, 0) ** 2), sol

    (ours, gradient), (theirs, want) = (
        (sol, gradient)
        for (_, sol), gradient in (
            jax.jit(jax.value_and_grad(lambda rate, call=call: solve(call, rate), has_aux=True))(jnp.array(1.0))
            for call in (pdx.diffeqsolve, dfx.diffeqsolve)
        )
    )
    assert counts(ours) == counts(theirs) and ours.result == theirs.result
    # The time of a step that is not located is that of the controller, which amplifies rounding.
    tolerance = 1e-9 if located else 1e-7
    close(ours.ts, theirs.ts, tolerance)
    close(ours.ys, theirs.ys, tolerance)
    close(gradient, want, 1e3 * tolerance)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a) == bool(b), ours.event_mask, theirs.event_mask))


def test_a_member_of_a_batch_that_runs_out_of_steps_ends_there_though_an_event_occurs_in_another():
    def solve(call, level):
        event = dfx.Event(lambda t, y, args, **kwargs: y[1] - level, optx.Newton(1e-10, 1e-10))
        return end(call, 1.0, event=event, max_steps=8, throw=False)

    levels = jnp.array([0.6, 9.0])
    ours = jax.jit(jax.vmap(lambda level: solve(pdx.diffeqsolve, level)))(levels)
    np.testing.assert_array_equal(ours.result == dfx.RESULTS.event_occurred, [True, False])
    np.testing.assert_array_equal(ours.result == dfx.RESULTS.max_steps_reached, [False, True])
    for k in range(2):
        theirs = solve(dfx.diffeqsolve, levels[k])
        close(ours.ts[k], theirs.ts)
        close(ours.ys[k], theirs.ys)


def test_dense_output_ends_at_an_event():
    event = dfx.Event(EVENTS["a float"][0], optx.Newton(1e-10, 1e-10))
    solve = lambda call: end(call, 1.0, event=event, saveat=dfx.SaveAt(dense=True, t1=True))
    ours, theirs = jax.jit(lambda: (solve(pdx.diffeqsolve), solve(dfx.diffeqsolve)))()
    close(ours.ts, theirs.ts)
    ts = jnp.linspace(0.0, ours.ts[-1], 7)
    close(jax.vmap(ours.evaluate)(ts), jax.vmap(theirs.evaluate)(ts))


def test_a_condition_that_is_not_a_number_is_a_failure():
    event = dfx.Event(lambda t, y, args, **kwargs: jnp.where(t > 3, jnp.nan, 1.0))
    sol = jax.jit(lambda: end(pdx.diffeqsolve, 1.0, event=event, throw=False))()
    assert sol.result == dfx.RESULTS.nonfinite and counts(sol)[0] < 20


def test_steps_are_not_stored_for_outputs():
    """The memory of a solve does not grow with `max_steps`, and that of its gradient by few numbers a step."""
    saveat, max_steps = dfx.SaveAt(ts=jnp.linspace(0.0, T1, 5)), 2**16
    solve = lambda y0: end(pdx.diffeqsolve, 1.0, y0=y0, saveat=saveat, max_steps=max_steps).ys
    memory = jax.jit(solve).lower(Y0).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * max_steps
    memory = jax.jit(jax.grad(lambda y0: jnp.sum(solve(y0)))).lower(Y0).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5 * 8 * max_steps


def test_outputs_of_a_step_from_where_the_explicit_part_has_an_infinite_slope():
    # The last number is zero in every stage, too.
    inflow = jnp.array([1.0, 1.0, 0.0])
    term = dfx.MultiTerm(
        dfx.ODETerm(lambda t, y, args: 0.3 * inflow - jnp.sqrt(y)),
        dfx.ODETerm(lambda t, y, args: 0.1 * inflow - 0.5 * y),
    )
    saveat = dfx.SaveAt(ts=jnp.array([0.0, 1e-4, 1.0]))
    options = {
        "solver": dfx.KenCarp3(),
        "term": term,
        "y0": jnp.array([0.5, 0.0, 0.0]),
        "t1": 1.0,
        "dt0": 0.01,
        "saveat": saveat,
    }
    ours, theirs = jax.jit(lambda: [end(solve, 1.0, **options) for solve in (pdx.diffeqsolve, dfx.diffeqsolve)])()
    assert counts(ours) == counts(theirs)
    close(ours.ys, theirs.ys, 1e-7)


def test_a_solver_with_a_state_starts_afresh_at_a_jump():
    term = dfx.ODETerm(lambda t, y, args: jnp.where(t < 1, 1.0, -3.0) * y)
    controller = dfx.ClipStepSizeController(dfx.PIDController(1e-3, 1e-5), jump_ts=jnp.array([1.0]))
    options = {"solver": dfx.ReversibleHeun(), "term": term, "t1": 2.0, "controller": controller}
    ours, theirs = jax.jit(lambda: [end(solve, 1.0, **options) for solve in (pdx.diffeqsolve, dfx.diffeqsolve)])()
    assert counts(ours) == counts(theirs)
    close(ours.ys, theirs.ys)


def test_adaptive_steps_of_a_stochastic_equation_have_derivatives_in_both_modes():
    """A Brownian path refuses times that have tangents, even of zero, and times outside its range, also in a member of a
    batch that makes fewer steps than another."""
    path = dfx.VirtualBrownianTree(1.9, 3.1, 1e-3, (), jax.random.key(0), dfx.SpaceTimeLevyArea)
    noise = dfx.ControlTerm(lambda t, y, args: 0.2 * y, path)

    def final(rate, adjoint):
        term = dfx.MultiTerm(dfx.ODETerm(lambda t, y, args: -rate * y**3), noise)
        controller = dfx.PIDController(rtol=1e-2, atol=1e-3)
        sol = pdx.diffeqsolve(
            term, dfx.SPaRK(), 2.0, 3.0, 0.05, 1.0, stepsize_controller=controller, adjoint=adjoint
        )  # fmt: skip
        return sol.ys[0], sol.stats["num_accepted_steps"]

    reverse = jax.grad(lambda rate: final(rate, dfx.RecursiveCheckpointAdjoint()), has_aux=True)
    forward = jax.jacfwd(lambda rate: final(rate, dfx.ForwardMode()), has_aux=True)
    (reverse, counts), (forward, _) = (jax.jit(jax.vmap(f))(jnp.array([1.0, 50.0])) for f in (reverse, forward))
    assert counts[0] < counts[1]
    np.testing.assert_allclose(forward, reverse, rtol=1e-10)


def test_a_stage_without_weight_that_is_not_finite_makes_the_step_so():
    """The second stage of `Dopri5` is beyond where the field is defined, and has no weight in the step. The field gives
    numbers for NaN, so that no other stage tells."""
    term = dfx.ODETerm(lambda t, y, args: jnp.where(y > 1, jnp.nan, 1.0))
    t1 = 1.1 / float(dfx.Dopri5.tableau.c[0])
    ends = [
        end(solve, 0.0, dfx.Dopri5(), term, 0.0, t1=t1, dt0=t1, controller=dfx.ConstantStepSize(), throw=False)
        for solve in (pdx.diffeqsolve, dfx.diffeqsolve)
    ]
    assert all(np.isnan(sol.ys[0]) for sol in ends) and ends[0].result != dfx.RESULTS.successful
