"""With only the import of `diffeqsolve` changed, a call has the result that it has in Diffrax."""

import functools as ft
import inspect

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, FAILED_CHECK, only_full, parallel_solver


MODE = dfx.ForwardMode()
PID = dfx.PIDController(rtol=1e-6, atol=1e-8)
COUNTS = ("num_steps", "num_accepted_steps", "num_rejected_steps", "max_steps")
STOPPED = dfx.RESULTS.max_steps_reached
SOLVES = [pdx.diffeqsolve, dfx.diffeqsolve]


def is_parallel(sol):
    return "windows" in sol.stats


def assert_close(ours, theirs, tolerance=1e-11):
    """The same structure, dtypes and numbers, infinite where the other is."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def assert_same(ours, theirs, tolerance=1e-11):
    assert is_parallel(ours) and not is_parallel(theirs)
    assert_close((ours.ts, ours.ys, ours.event_mask), (theirs.ts, theirs.ys, theirs.event_mask), tolerance)
    assert bool(ours.result == theirs.result)
    assert {name: ours.stats[name] for name in COUNTS} == {name: theirs.stats[name] for name in COUNTS}


def driven(solve, t0=0.0, t1=3.0, dt0=0.07, y0=DRIVEN_Y0, args=DRIVEN_ARGS, terms=DRIVEN, solver=dfx.Tsit5(), **kwargs):
    return solve(terms, solver, t0, t1, dt0, y0, args, **kwargs)


def test_the_signature_is_that_of_diffrax():
    ours, theirs = (inspect.signature(solve).parameters.values() for solve in SOLVES)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.name, mine.kind) == (other.name, other.kind)
        assert str(mine.default) == str(other.default)


def test_constant_steps_with_every_kind_of_output_are_those_of_diffrax():
    """43 steps, the last of them shorter."""
    ts = jnp.linspace(0.0, 3.0, 8)
    subs = {
        "a": dfx.SubSaveAt(t0=True, ts=ts, t1=True),
        "b": dfx.SubSaveAt(ts=ts[2:4] + 0.01, fn=lambda t, y, args: (t, args[0] * y[:1])),
    }
    ours, theirs = (driven(solve, saveat=dfx.SaveAt(subs=subs, dense=True)) for solve in SOLVES)
    assert_same(ours, theirs)
    assert int(ours.stats["num_steps"]) == 43
    assert pdx.statistics(ours).windows == 1
    assert int(pdx.statistics(ours).parallel_steps) + int(pdx.statistics(ours).sequential_steps) == 43
    assert jax.tree.structure(ours.interpolation) == jax.tree.structure(theirs.interpolation)
    for t in (0.0, 1.234, 3.0):
        assert_close(ours.evaluate(t), theirs.evaluate(t))
    assert_close(ours.derivative(0.5), theirs.derivative(0.5))


@pytest.mark.parametrize("adjoint", [dfx.RecursiveCheckpointAdjoint(), *only_full(dfx.DirectAdjoint())])
def test_gradients_by_states_and_parameters_are_those_of_diffrax(adjoint):
    def loss(y0, args, solve):
        sol = driven(solve, t1=1.5, y0=y0, args=args, saveat=dfx.SaveAt(ts=jnp.array([0.3, 1.5])), adjoint=adjoint)
        return jnp.sum(sol.ys**3)

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    assert_close(*(gradient(DRIVEN_Y0, DRIVEN_ARGS, solve) for solve in SOLVES))


@pytest.mark.full
def test_forward_mode_is_that_of_diffrax():
    def end(y0, solve):
        return driven(solve, t1=1.5, y0=y0, adjoint=MODE).ys

    tangent = jnp.array([1.0, -2.0])
    assert_close(*(jax.jvp(ft.partial(end, solve=solve), (DRIVEN_Y0,), (tangent,)) for solve in SOLVES))


@pytest.mark.full
def test_a_grid_of_ones_own_a_pytree_and_time_that_runs_backward():
    ts = 2 - jnp.linspace(0.0, 1.4, 24) ** 2

    def field(t, y, args):
        return {"x": (y["v"],), "v": -args * y["x"][0] * t}

    call = dict(terms=dfx.ODETerm(field), t0=ts[0], t1=ts[-1], dt0=None, args=1.5)
    call |= dict(y0={"x": (jnp.array([1.0, 0.5]),), "v": jnp.array([0.0, 0.3])})
    call |= dict(stepsize_controller=dfx.StepTo(ts), saveat=dfx.SaveAt(ts=jnp.array([1.9, 1.0, 0.1]), t1=True))
    assert_same(*(driven(solve, **call) for solve in SOLVES))


@pytest.mark.full
def test_traced_times_and_step_sizes_in_a_batch():
    """Members have 5, 22 and 40 steps; the last is stopped after 32."""

    def solve_one(solve, t1, dt0):
        saveat = dfx.SaveAt(ts=jnp.array([0.25, 1.0]) * t1, t1=True)
        sol = driven(solve, t1=t1, dt0=dt0, saveat=saveat, max_steps=32, throw=False)
        return sol.ts, sol.ys, {name: sol.stats[name] for name in COUNTS[:3]}, sol.result == STOPPED, is_parallel(sol)

    t1s, dt0s = jnp.array([0.5, 2.0, 3.0]), jnp.array([0.1, 0.091, 0.075])
    results = [eqx.filter_jit(eqx.filter_vmap(solve_one, in_axes=(None, 0, 0)))(solve, t1s, dt0s) for solve in SOLVES]
    (*ours, parallel), (*theirs, _) = results
    assert parallel
    assert_close(ours[:3], theirs[:3])
    assert ours[2]["num_steps"].tolist() == [5, 22, 32]
    assert ours[3].tolist() == theirs[3].tolist() == [False, False, True]


def test_adaptive_steps_keep_the_tolerance_and_count_steps():
    ts = jnp.linspace(0.0, 30.0, 5)

    def solve(solve, tolerance, args):
        controller = dfx.PIDController(rtol=tolerance, atol=tolerance / 100)
        return driven(solve, t1=30.0, dt0=None, args=args, stepsize_controller=controller, saveat=dfx.SaveAt(ts=ts))

    exact = solve(dfx.diffeqsolve, 1e-11, DRIVEN_ARGS).ys
    ours, theirs = (solve(fn, 1e-6, DRIVEN_ARGS) for fn in SOLVES)
    assert is_parallel(ours)
    assert np.max(np.abs(ours.ys - exact)) <= 2 * np.max(np.abs(theirs.ys - exact))
    num_steps, accepted, rejected, max_steps = (ours.stats[name] for name in COUNTS)
    assert max_steps == 4096 and int(num_steps) == int(accepted) + int(rejected)
    statistics = pdx.statistics(ours)
    assert int(accepted) == int(statistics.parallel_steps) + int(statistics.sequential_steps)
    assert int(num_steps) <= 4 * int(theirs.stats["num_steps"])


@pytest.mark.full
def test_steps_end_at_jumps():
    """A dose from 1 to 2. `y' = 50 p - y` between, `y' = -y` elsewhere."""
    jumps = jnp.array([1.0, 2.0])

    def end(p, solve):
        terms = dfx.ODETerm(lambda t, y, args: jnp.where((t > 1) & (t < 2), 50 * args, 0.0) - y)
        controller = dfx.ClipStepSizeController(PID, jump_ts=jumps)
        sol = driven(solve, dt0=None, y0=jnp.array(1.0), args=p, terms=terms, stepsize_controller=controller)
        return sol.ys[-1], sol

    (y, sol), gradient = jax.value_and_grad(end, has_aux=True)(jnp.array(0.7), pdx.diffeqsolve)
    exact = np.exp(-3.0) + 0.7 * 50 * (np.exp(-1.0) - np.exp(-2.0))
    assert is_parallel(sol)
    assert abs(y - exact) < 1e-5
    assert abs(gradient - 50 * (np.exp(-1.0) - np.exp(-2.0))) < 1e-4
    # A step that ends just before a jump may have to be shortened, as in Diffrax.
    assert int(sol.stats["num_rejected_steps"]) == int(end(0.7, dfx.diffeqsolve)[1].stats["num_rejected_steps"]) <= 1


# Events.


def test_the_first_of_several_events_is_located_as_diffrax_does_with_its_derivative():
    """A float crosses zero in step 20 of 43, a boolean is true later."""
    conditions = [lambda t, y, args, **kwargs: t > 2.0, lambda t, y, args, **kwargs: y[0] - 0.2]
    event = dfx.Event(conditions, optx.Newton(1e-12, 1e-12), direction=[None, False])

    def last(y0, solve):
        sol = driven(solve, y0=y0, event=event, saveat=dfx.SaveAt(ts=jnp.linspace(0.0, 3.0, 6), t1=True), adjoint=MODE)
        index = jnp.sum(jnp.isfinite(sol.ts)) - 1
        return sol.ts[index] + sol.ys[index, 1], sol

    tangent = jnp.array([1.0, -2.0])
    results = [jax.jvp(ft.partial(last, solve=solve), (DRIVEN_Y0,), (tangent,), has_aux=True) for solve in SOLVES]
    (*our_values, ours), (*their_values, theirs) = results
    assert_same(ours, theirs, 1e-9)
    assert_close(our_values, their_values, 1e-8)
    assert ours.event_mask == [False, True] and int(ours.stats["num_steps"]) < 43


@pytest.mark.full
def test_a_boolean_event_ends_the_solve_at_the_end_of_a_step():
    event = dfx.Event(lambda t, y, args, **kwargs: y[0] < 0.2)
    call = dict(t1=jnp.inf, max_steps=200, event=event, saveat=dfx.SaveAt(t1=True, ts=jnp.array([0.5, 40.0])))
    assert_same(*(driven(solve, **call) for solve in SOLVES))


def test_a_bouncing_ball_falls_from_the_floor_again():
    """One call a bounce, in `lax.scan`: each flight begins at zero, the value at which its event occurs. With the speed `v`,
    a flight takes `2 v / g`; a bounce keeps the fraction `r` of the speed."""
    terms = dfx.ODETerm(lambda t, y, args: jnp.stack([y[1], -args]))
    event = dfx.Event(lambda t, y, args, **kwargs: y[0], optx.Newton(1e-10, 1e-10), direction=False)
    g, restitution, height = 9.8, 0.8, 1.5

    def bounces(height, solve):
        def bounce(carry, _):
            t, y = carry
            sol = solve(
                *(terms, dfx.Tsit5(), t, jnp.inf, 0.01, y, g), event=event, saveat=dfx.SaveAt(t1=True), max_steps=256
            )
            t, y = sol.ts[0], jnp.array([0.0, -restitution]) * sol.ys[0]
            return (t, y), t

        return jax.lax.scan(bounce, (jnp.array(0.0), jnp.array([height, 0.0])), length=4)[1]

    fall = np.sqrt(2 * height / g)
    exact = fall * (1 + 2 * np.cumsum([0, restitution, restitution**2, restitution**3]))
    times, tangents = jax.jvp(lambda h: bounces(h, pdx.diffeqsolve), (jnp.array(height),), (jnp.array(1.0),))
    np.testing.assert_allclose(times, exact, rtol=1e-9)
    np.testing.assert_allclose(tangents, exact / (2 * height), rtol=1e-8)


# Other solvers.


def brownian_motion(levy_area=dfx.BrownianIncrement):
    return dfx.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jax.random.key(0), levy_area=levy_area)


@pytest.mark.full
def test_euler_maruyama_takes_the_same_path():
    diffusion = lambda t, y, args: 0.2 * jnp.diag(y)
    terms = dfx.MultiTerm(DRIVEN, dfx.ControlTerm(diffusion, brownian_motion()))
    call = dict(terms=terms, t1=1.0, dt0=0.03, solver=dfx.Euler(), saveat=dfx.SaveAt(ts=jnp.array([0.5, 1.0])))
    assert_same(*(driven(solve, **call) for solve in SOLVES))


@pytest.mark.full
@pytest.mark.parametrize("solver", [dfx.ShARK(), dfx.Heun(), dfx.SPaRK(), dfx.GeneralShARK()])
def test_methods_for_additive_noise_take_the_same_path(solver):
    noise = dfx.ControlTerm(lambda t, y, args: jnp.diag(jnp.array([0.1, 0.2])), brownian_motion(dfx.SpaceTimeLevyArea))
    terms = dfx.MultiTerm(DRIVEN, noise)
    assert_same(*(driven(solve, terms=terms, t1=1.0, dt0=0.03, solver=solver) for solve in SOLVES), 1e-10)


@pytest.mark.full
def test_an_implicit_method_on_equal_steps():
    solver = dfx.Kvaerno3(root_finder=optx.Newton(rtol=1e-11, atol=1e-11))
    assert_same(*(driven(solve, t1=1.0, solver=solver) for solve in SOLVES), 1e-9)


@pytest.mark.parametrize("solver", only_full(dfx.LeapfrogMidpoint(), dfx.ReversibleHeun()))
def test_methods_that_carry_a_state(solver):
    """43 steps in a window for 64: a step of length zero by `LeapfrogMidpoint` is not the identity."""
    assert_same(*(driven(solve, solver=solver) for solve in SOLVES))


@pytest.mark.full
def test_a_stiff_equation_by_an_implicit_method_keeps_the_tolerance():
    def robertson(t, y, args):
        a, b, c = y
        fast, slow = 1e4 * b * c, 0.04 * a
        return jnp.stack([fast - slow, slow - fast - 3e7 * b**2, 3e7 * b**2])

    y0, controller = jnp.array([1.0, 0.0, 0.0]), dfx.PIDController(rtol=1e-6, atol=1e-9)
    call = dict(terms=dfx.ODETerm(robertson), t1=100.0, dt0=2e-4, y0=y0, solver=dfx.Kvaerno5())
    ours, theirs = (driven(solve, stepsize_controller=controller, **call) for solve in SOLVES)
    assert is_parallel(ours)
    assert_close(ours.ys, theirs.ys, 1e-5)


@pytest.mark.full
def test_an_implicit_explicit_method_keeps_the_tolerance():
    terms = dfx.MultiTerm(dfx.ODETerm(lambda t, y, args: jnp.sin(y[::-1])), dfx.ODETerm(lambda t, y, args: -30 * y))
    # With a tolerance of 1e-6, Diffrax needs more than 4096 steps.
    controller = dfx.PIDController(rtol=1e-4, atol=1e-6)
    call = dict(terms=terms, t1=1.0, dt0=0.01, solver=dfx.KenCarp4(), stepsize_controller=controller)
    ours, theirs = (driven(solve, **call) for solve in SOLVES)
    assert is_parallel(ours)
    assert_close(ours.ys, theirs.ys, 1e-4)


def test_a_parallel_solver_keeps_its_windows():
    """40 steps in windows of 16."""
    solver = parallel_solver(dfx.Tsit5(), num_steps=16, predictor=pdx.ConstantPredictor())
    ours = driven(pdx.diffeqsolve, t1=2.0, dt0=0.05, solver=solver)
    assert_same(ours, driven(dfx.diffeqsolve, t1=2.0, dt0=0.05))
    assert pdx.statistics(ours).windows == 3


# What is left to Diffrax.


class Counter(dfx.Euler):
    """A solver that counts its steps."""

    def init(self, terms, t0, t1, y0, args):
        return jnp.array(0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, error, dense, _, result = super().step(terms, t0, t1, y0, args, None, made_jump)
        return y1, error, dense, solver_state + 1, result


def called_back(t, y, args):
    return jax.pure_callback(lambda y: -np.asarray(y), jax.ShapeDtypeStruct(y.shape, y.dtype), y)


LEFT = {
    "steps": dict(saveat=dfx.SaveAt(steps=2)),
    "controller state": dict(saveat=dfx.SaveAt(t1=True, controller_state=True)),
    "adjoint": dict(adjoint=dfx.BacksolveAdjoint()),
    "controller": dict(stepsize_controller=dfx.ClipStepSizeController(PID, store_rejected_steps=10)),
    "integer state": dict(solver=Counter()),
    "no derivative": dict(terms=dfx.ODETerm(called_back), solver=dfx.Euler()),
    "more steps than allowed": dict(max_steps=10, throw=False),
    "Brownian motion without memory": dict(
        terms=dfx.ControlTerm(lambda t, y, args: y, dfx.UnsafeBrownianPath((), jax.random.key(0))),
        solver=dfx.Euler(),
        adjoint=dfx.DirectAdjoint(),
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_has_no_meaning_for_windows_is_left_to_diffrax(name):
    call = LEFT[name]
    ours, theirs = (driven(solve, t1=1.0, **call) for solve in SOLVES)
    assert not is_parallel(ours)
    assert_close(ours, theirs, 0)
    with pytest.raises(ValueError, match="solver state"):
        pdx.statistics(ours)


def test_errors_are_those_of_diffrax():
    def missing(t, y, args):
        return y["missing"]

    calls = {
        "Constant step size solvers": dict(dt0=None),
        "tolerances for the implicit": dict(solver=dfx.Kvaerno5()),
        "index": dict(terms=dfx.ODETerm(missing)),
    }
    for message, call in calls.items():
        for solve in SOLVES:
            with pytest.raises((TypeError, IndexError, ValueError), match=message):
                driven(solve, **call)


def test_too_many_steps_raise_as_in_diffrax():
    """The step size is traced, so the number of steps is not known in advance."""
    terms = dfx.ODETerm(lambda t, y, args: -y)

    def solve(dt0):
        return pdx.diffeqsolve(terms, dfx.Euler(), 0.0, 3.0, dt0, jnp.array(1.0), max_steps=16).ys

    assert_close(jax.jit(solve)(0.2), jnp.array([0.8**15]))
    with pytest.raises(FAILED_CHECK, match="maximum number of solver steps"):
        jax.jit(solve)(0.1)
