"""Step maps make the very steps of Diffrax's solvers, for every explicit Runge-Kutta method and for the others."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx
from parallel_diffrax._ode._step_map import _explicit_runge_kutta, ExplicitRungeKuttaStep, GenericStep, make_step_map
from parallel_diffrax._scan import eliminate

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, parallel_solver, relative_difference


# The cheapest to compile: neither the guess nor the policy is what is tested.
CHEAP = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}
EXPLICIT = [dfx.Heun, dfx.Midpoint, dfx.Ralston, dfx.Bosh3, dfx.Tsit5, dfx.Dopri5, dfx.Dopri8]


def flatten(tree):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("solver", EXPLICIT, ids=lambda s: s.__name__)
def test_an_unrolled_step_is_diffraxs_step(solver):
    step_map = make_step_map(solver(), DRIVEN, DRIVEN_Y0, DRIVEN_ARGS, pdx.ParallelNewton())
    assert isinstance(step_map, ExplicitRungeKuttaStep)
    t0, t1 = jnp.array(0.3), jnp.array(0.42)
    got = step_map(t0, t1, DRIVEN_Y0)
    base = solver()
    state = base.init(DRIVEN, t0, t1, DRIVEN_Y0, DRIVEN_ARGS)
    y1, y_error, dense_info, _, _ = base.step(DRIVEN, t0, t1, DRIVEN_Y0, DRIVEN_ARGS, state, made_jump=True)
    np.testing.assert_allclose(got.y1, y1, rtol=1e-15)
    np.testing.assert_allclose(got.y_error, y_error, atol=1e-15)
    assert jax.tree.structure(got.dense_info) == jax.tree.structure(dense_info)
    np.testing.assert_allclose(flatten(got.dense_info), flatten(dense_info), rtol=1e-14, atol=1e-16)


def test_a_subclass_with_a_step_of_its_own_and_a_wrapper_are_not_unrolled():
    class Slower(dfx.Tsit5):
        def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
            y1, *rest = super().step(terms, t0, t1, y0, args, solver_state, made_jump)
            return 0.5 * y1, *rest

    half = jnp.array(0.5)
    for solver in (Slower(), dfx.HalfSolver(dfx.Heun()), dfx.Euler()):
        step_map = make_step_map(solver, DRIVEN, DRIVEN_Y0, DRIVEN_ARGS, pdx.ParallelNewton())
        assert isinstance(step_map, GenericStep)
        state = solver.init(DRIVEN, 0.0, half, DRIVEN_Y0, DRIVEN_ARGS)
        want = solver.step(DRIVEN, 0.0, half, DRIVEN_Y0, DRIVEN_ARGS, state, made_jump=True)[0]
        np.testing.assert_allclose(step_map(jnp.array(0.0), half, DRIVEN_Y0).y1, want, rtol=1e-14)


# Of the other solvers, steps are compared with Diffrax's (`test_solver_table.py`).
ORDERS = [(dfx.Heun(), 2), (dfx.Tsit5(), 5), (dfx.Dopri8(), 8)]


@functools.cache
def reference():
    return dfx.diffeqsolve(DRIVEN, dfx.Dopri8(), 0.0, 6.0, 6.0 / 400, DRIVEN_Y0, DRIVEN_ARGS).ys[-1]


@pytest.mark.parametrize("solver,order", ORDERS, ids=[type(s).__name__ for s, _ in ORDERS])
def test_a_window_converges_with_the_order_of_its_base_solver(solver, order):
    # Eight windows or sixteen, of as many steps each: one program, two step sizes.
    parallel = parallel_solver(solver, 2 if order == 8 else 8, **CHEAP)

    exact = reference()

    @jax.jit
    def error(window):
        sol = dfx.diffeqsolve(DRIVEN, parallel, 0.0, 6.0, window, DRIVEN_Y0, DRIVEN_ARGS, max_steps=16)
        return jnp.linalg.norm(sol.ys[-1] - exact)

    errors = [float(error(jnp.array(6.0 / windows))) for windows in (8, 16)]
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.5, errors


IMPLICIT = [dfx.ImplicitEuler(), dfx.Kvaerno5()]


@pytest.mark.parametrize("solver", IMPLICIT, ids=lambda s: type(s).__name__)
def test_implicit_solvers_agree_with_diffrax_and_need_no_tolerances(solver):
    newton = optx.Newton(rtol=1e-12, atol=1e-13)
    base = eqx.tree_at(lambda s: s.root_finder, solver, newton)
    saveat = dfx.SaveAt(ts=jnp.linspace(0.0, 2.0, 5))
    parallel = parallel_solver(solver, 16, **CHEAP)
    got = dfx.diffeqsolve(DRIVEN, parallel, 0.0, 2.0, 2.0, DRIVEN_Y0, DRIVEN_ARGS, saveat=saveat)
    want = dfx.diffeqsolve(DRIVEN, base, 0.0, 2.0, 2.0 / 16, DRIVEN_Y0, DRIVEN_ARGS, saveat=saveat)
    assert relative_difference(got.ys, want.ys) < 1e-10


def test_elimination_pivots_and_marks_singular_systems():
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(20, 5, 5))
    matrices[:, 0, 0] = 0.0
    vectors = rng.normal(size=(20, 5))
    got = eliminate(jnp.asarray(matrices), jnp.asarray(vectors)[..., None])[..., 0]
    np.testing.assert_allclose(got, np.linalg.solve(matrices, vectors[..., None])[..., 0], rtol=1e-9)
    assert not np.isfinite(eliminate(jnp.zeros((3, 3)), jnp.ones((3, 1)))).any()


def test_stages_in_a_loop_are_the_unrolled_ones_with_their_derivatives(monkeypatch):
    """As for a field of many operations on a CPU; the state is a dictionary."""

    def field(t, y, rate):
        x, v = y["x"], y["v"]
        for _ in range(2):
            x = jnp.sin(x) * jnp.sqrt(1 + x * x) + 0.1 * jnp.roll(x, 1) - rate * x**3 / (1 + x**2)
        return {"x": 0.1 * x - y["x"] * jnp.cos(t), "v": -v + jnp.sum(x)}

    y0, h = {"x": jnp.linspace(-1.0, 1.0, 6), "v": jnp.array(0.3)}, 0.1

    def step(solver, y0, t, rate):
        step_map = ExplicitRungeKuttaStep(solver, dfx.ODETerm(field), rate)
        out = step_map(t, t + h, y0)
        return out.y1, out.y_error, out.dense_info, step_map.increment(t, t + h, y0)

    for solver in (dfx.Tsit5(), dfx.Heun()):

        def loss(y0, t, rate, solver=solver):
            y1, _, _, increment = step(solver, y0, t, rate)
            return y1["v"] + jnp.sum(increment["x"])

        def values_and_gradient(solver=solver, loss=loss):
            return step(solver, y0, 0.2, 0.5), jax.grad(loss, (0, 1, 2))(y0, 0.2, 0.5)

        monkeypatch.setattr(_explicit_runge_kutta, "_MOST_OPERATIONS", 1e9)
        want = values_and_gradient()
        monkeypatch.setattr(_explicit_runge_kutta, "_MOST_OPERATIONS", 0.0)
        program = jax.make_jaxpr(lambda solver=solver: step(solver, y0, 0.2, 0.5))()
        assert "scan" in str(program)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
        jax.tree.map(close, values_and_gradient(), want)


def test_large_arrays_and_cheap_fields_are_unrolled():
    network = lambda t, y, args: jnp.tanh(jnp.ones((64, 64)) @ y)
    for field, y0 in ((lambda t, y, args: -y, jnp.ones(3)), (network, jnp.ones(64))):
        step_map = ExplicitRungeKuttaStep(dfx.Tsit5(), dfx.ODETerm(field), None)
        assert "scan" not in str(jax.make_jaxpr(lambda y, m=step_map: m.increment(0.0, 0.1, y))(y0))
