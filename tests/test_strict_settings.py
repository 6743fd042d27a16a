"""Solves and their gradients under JAX's settings for debugging, and without 64-bit numbers. (Rank and dtype promotion are
strict in the whole suite.)"""

import contextlib

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import only_full, parallel_solver


SOLVERS = {
    "explicit": parallel_solver(dfx.Heun(), 16),
    "adaptive": parallel_solver(dfx.Tsit5(), 16),
    "implicit": parallel_solver(dfx.ImplicitEuler(), 16),
    "warm start": parallel_solver(dfx.Heun(), 16, predictor=pdx.WarmStart()),
}
TOLERANCES = dfx.PIDController(rtol=1e-4, atol=1e-5)


@contextlib.contextmanager
def setting(name):
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def gradient(solver, controller=dfx.ConstantStepSize(), dtype=float):
    def loss(y0, a):
        term = dfx.ODETerm(lambda t, y, a: a * jnp.sin(y[::-1]) - y * jnp.cos(t))
        sol = dfx.diffeqsolve(term, solver, 0.0, 2.0, 1.0, y0, a, stepsize_controller=controller, max_steps=64)
        return jnp.sum(sol.ys**2)

    return jax.grad(loss, argnums=(0, 1))(jnp.array([0.4, -0.9], dtype), jnp.array(1.3, dtype))


@pytest.mark.parametrize("solver", ["explicit", *only_full("implicit", "warm start")])
def test_a_healthy_gradient_has_no_nan(solver):
    # Outside `jax.jit` JAX looks at all that the backward pass is given.
    want = gradient(SOLVERS[solver])
    with setting("jax_debug_nans"):
        got = gradient(SOLVERS[solver])
    np.testing.assert_array_equal(got[0], want[0])


@pytest.mark.full
@pytest.mark.parametrize("name", ["jax_enable_checks", "jax_check_tracer_leaks"])
def test_internal_checks_of_jax_pass(name):
    with setting(name):
        got = gradient(parallel_solver(dfx.Heun(), 8))
    assert np.isfinite(got[0]).all()


@pytest.mark.parametrize(
    "solver, controller",
    [("explicit", dfx.ConstantStepSize()), *only_full(("adaptive", TOLERANCES), ("implicit", dfx.ConstantStepSize()))],
    ids=["explicit", "adaptive", "implicit"],
)
def test_without_64_bit_numbers(solver, controller):
    want = gradient(SOLVERS[solver], controller)
    with jax.enable_x64(False):
        got = gradient(SOLVERS[solver], controller, jnp.float32)
    assert got[0].dtype == jnp.float32
    np.testing.assert_allclose(got[0], want[0], rtol=2e-4)
    np.testing.assert_allclose(got[1], want[1], rtol=2e-4)
