"""Fields without derivatives in forward mode: steps are made sequentially, and reverse mode works if the field has it."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import only_full, parallel_solver


NUM_STEPS = 16
Y0, A = jnp.array([0.4, -0.9]), jnp.array(1.3)


@jax.custom_vjp
def sine(y):
    return jnp.sin(y)


sine.defvjp(lambda y: (jnp.sin(y), y), lambda y, cotangent: (jnp.cos(y) * cotangent,))


def callback(vmap_method):
    # JAX's own check of devices inside a callback can deadlock: NumPy only.
    return lambda y: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(y.shape, y.dtype), y, vmap_method=vmap_method)


def loss(sine, solver, dt0, adjoint=dfx.RecursiveCheckpointAdjoint()):
    term = dfx.ODETerm(lambda t, y, a: a * sine(y[::-1]) - y * jnp.cos(t))
    saveat = dfx.SaveAt(t1=True, ts=jnp.array([0.3, 1.0]), solver_state=isinstance(solver, pdx.ParallelSolver))

    def value(y0, a):
        sol = dfx.diffeqsolve(term, solver, 0.0, 2.0, dt0, y0, a, saveat=saveat, adjoint=adjoint, max_steps=64)
        return jnp.sum(sol.ys**2), sol

    return value


def parallel(**options):
    return parallel_solver(dfx.Tsit5(), NUM_STEPS, **options)


# Windows that end at the outputs' times would change the grid: two windows, and outputs between their steps.
WINDOW = 1.0


def expected(fn):
    return jax.jit(fn(lambda *x: loss(jnp.sin, parallel(), WINDOW)(*x)[0]))(Y0, A)


@pytest.mark.parametrize("name", ["custom_vjp", *only_full("callback without vmap", "callback")])
def test_all_steps_are_made_sequentially_with_the_right_values(name):
    field = {"custom_vjp": sine, "callback": callback("sequential"), "callback without vmap": callback(None)}[name]
    value, sol = jax.jit(loss(field, parallel(), WINDOW))(Y0, A)
    np.testing.assert_allclose(value, expected(lambda f: f), rtol=1e-13)
    statistics = pdx.statistics(sol)
    assert (statistics.parallel_steps, statistics.sequential_steps, statistics.attempts) == (0, 2 * NUM_STEPS, 0)


@pytest.mark.parametrize(
    "adjoint", [dfx.RecursiveCheckpointAdjoint(), *only_full(pdx.ParallelAdjoint())], ids=["default", "parallel"]
)
def test_reverse_mode_sweeps_over_vector_jacobian_products(adjoint):
    gradient = lambda f: jax.grad(f, argnums=(0, 1))
    got = jax.jit(gradient(lambda *x: loss(sine, parallel(), WINDOW, adjoint)(*x)[0]))(Y0, A)
    for g, want in zip(got, expected(gradient)):
        np.testing.assert_allclose(g, want, rtol=1e-12)


def scanned(sine, scan):
    def f(carry, x):
        carry = 0.9 * sine(carry[::-1]) + x
        return carry, carry * x

    return lambda init, xs: jnp.sum(scan(f, init, xs)[1] ** 2)


def test_second_derivatives_by_reverse_mode_twice():
    xs = jnp.linspace(0, 1, 12)
    hessian = lambda sine, scan: jax.jacrev(jax.grad(scanned(sine, scan), argnums=(0, 1)), argnums=(0, 1))(Y0, xs)
    got, want = hessian(sine, pdx.parallel_scan), hessian(jnp.sin, jax.lax.scan)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-13), got, want)


def test_a_failed_step_has_nan_derivatives():
    def f(carry, x):
        return carry + x * sine(carry) / (x - 3), None

    xs = jnp.arange(6.0)
    end = lambda xs, k: pdx.parallel_scan(f, jnp.array(0.5), xs[:k], throw=False)[0]
    np.testing.assert_allclose(
        jax.grad(end)(xs, 3), jax.grad(lambda xs: jax.lax.scan(f, jnp.array(0.5), xs[:3])[0])(xs), rtol=1e-13
    )
    assert np.isnan(jax.grad(end)(xs, 6)[:3]).all()


@pytest.mark.full
def test_a_root_finder_that_needs_no_derivatives_is_used():
    solver = parallel(root_finder=pdx.ParallelNewton(jacobian=pdx.jacobians.Identity()))
    value, sol = jax.jit(loss(sine, solver, WINDOW))(Y0, A)
    np.testing.assert_allclose(value, expected(lambda f: f), rtol=1e-9)
    assert pdx.statistics(sol).parallel_steps == 2 * NUM_STEPS


def test_derivatives_that_do_not_exist_are_refused():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda y: loss(sine, parallel(), WINDOW, dfx.DirectAdjoint())(y, A)[0], (Y0,), (Y0,))
    with pytest.raises(ValueError, match="callbacks do not support JVP"):
        jax.grad(lambda y: loss(callback("sequential"), parallel(), WINDOW)(y, A)[0])(Y0)


def test_the_policy_that_makes_no_sequential_steps_is_refused():
    with pytest.raises(TypeError, match=r"`ParallelOnly\(\)`: the root finder needs derivatives"):
        loss(sine, parallel(policy=pdx.policies.ParallelOnly()), WINDOW)(Y0, A)


def test_a_custom_vjp_that_does_not_depend_on_the_state_is_no_obstacle():
    term = dfx.ODETerm(lambda t, y, a: a * sine(t) - y)
    sol = dfx.diffeqsolve(term, parallel(), 0.0, 1.0, 1.0, Y0, A, saveat=dfx.SaveAt(t1=True, solver_state=True))
    assert pdx.statistics(sol).parallel_steps == NUM_STEPS
