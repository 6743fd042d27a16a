"""`MultipleShooting`: the steps of its base solver, with fewer unknowns; what it cannot do, it says."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import parallel_solver


SEGMENTS, SUBSTEPS, T = 96, 8, 30.0
TS = jnp.linspace(0.0, T, 41)
ARGS, Y0 = jnp.array([0.5, 0.08]), jnp.array([-1.0, 1.0])


def field(t, y, args):
    v, w = y
    return jnp.stack([v - v**3 / 3 - w + args[0] + 0.1 * jnp.sin(t), args[1] * (v + 0.7 - 0.8 * w)])


def solve(solver, dt0, max_steps, args=ARGS, t0=0.0, t1=T, **options):
    return dfx.diffeqsolve(
        dfx.ODETerm(field), solver, t0, t1, dt0, Y0, args, saveat=SAVEAT, max_steps=max_steps, **options
    )


SAVEAT = dfx.SaveAt(ts=TS, solver_state=True)


def segments(base=dfx.Tsit5(), **options):
    return parallel_solver(pdx.MultipleShooting(base, SUBSTEPS), SEGMENTS, **options)


def value_and_gradient(solver, dt0, max_steps, **options):
    def loss(args):
        sol = solve(solver, dt0, max_steps, args, **options)
        return jnp.sum(sol.ys**2), (sol.ys, sol.solver_state)

    (_, (ys, state)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(ARGS)
    return ys, state, gradient


@pytest.fixture(scope="module")
def sequential():
    return value_and_gradient(dfx.Tsit5(), T / (SEGMENTS * SUBSTEPS), SEGMENTS * SUBSTEPS)


def test_values_inside_segments_and_derivatives_are_those_of_the_base_solver_on_the_fine_grid(sequential):
    ys, _, gradient = sequential
    got, state, slope = value_and_gradient(segments(), T, 1)
    np.testing.assert_allclose(got, ys, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(slope, gradient, rtol=1e-9)
    assert (
        state.statistics.iterations <= 4
        and state.statistics.parallel_steps == SEGMENTS
        and state.statistics.sequential_steps == 0
    )
    # As a solver of Diffrax's own loop.
    stock = jax.jit(lambda: solve(pdx.MultipleShooting(dfx.Tsit5(), SUBSTEPS), T / SEGMENTS, SEGMENTS).ys)()
    np.testing.assert_allclose(stock, ys, rtol=1e-12, atol=1e-12)


def test_all_outputs_at_once_and_steps_in_sequence_are_the_same(sequential):
    ys, _, gradient = sequential
    in_sequence = segments(policy=pdx.policies.Sequential())
    got, state, slope = value_and_gradient(in_sequence, T, 1, adjoint=pdx.ParallelAdjoint())
    np.testing.assert_allclose(got, ys, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(slope, gradient, rtol=1e-9)
    assert state.statistics.sequential_steps == SEGMENTS


def test_a_worse_guess_is_enough(sequential):
    ys, *_ = sequential
    options = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}
    solvers = segments(**options), parallel_solver(dfx.Tsit5(), SEGMENTS * SUBSTEPS, **options)
    shooting, plain = (jax.jit(lambda solver=solver: solve(solver, T, 1, throw=False))() for solver in solvers)
    np.testing.assert_allclose(shooting.ys, ys, rtol=1e-10, atol=1e-10)
    succeeded = plain.result == dfx.RESULTS.successful
    assert not succeeded or pdx.statistics(shooting).iterations < pdx.statistics(plain).iterations


def test_methods_of_low_order_have_good_guesses_and_error_estimates_add_up():
    def run():
        sol = solve(segments(dfx.Heun()), None, 64, stepsize_controller=dfx.PIDController(rtol=1e-4, atol=1e-6))
        exact = solve(dfx.Dopri8(), T / 2048, 2048).ys
        return sol.ys, sol.solver_state, exact

    ys, state, exact = jax.jit(run)()
    assert (
        state.statistics.windows >= 1
        and state.statistics.iterations <= 5 * state.statistics.windows
        and state.statistics.sequential_steps == 0
    )
    np.testing.assert_allclose(ys, exact, rtol=1e-3, atol=1e-3)


def test_less_is_kept():
    def size(solver):
        options = {"max_steps": 1, "adjoint": dfx.DirectAdjoint()}
        loss = lambda args: jnp.sum(
            dfx.diffeqsolve(dfx.ODETerm(field), solver, 0.0, T, T, jnp.tile(Y0, 4), args, **options).ys ** 2
        )
        return jax.jit(jax.grad(loss)).lower(ARGS).compile().memory_analysis().temp_size_in_bytes

    def field(t, y, args):
        return args[0] * jnp.roll(y, 1) - y + args[1]

    options = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}
    plain = size(parallel_solver(dfx.Heun(), 4096, **options))
    shooting = size(parallel_solver(pdx.MultipleShooting(dfx.Heun(), 16), 256, **options))
    # One Jacobian in sixteen, and all states.
    assert shooting < plain / 4


def test_solvers_that_are_not_explicit_are_refused():
    for solver in (dfx.Kvaerno3(), dfx.ReversibleHeun(), dfx.HalfSolver(dfx.Heun())):
        with pytest.raises(ValueError, match="explicit Runge-Kutta"):
            pdx.MultipleShooting(solver, 4)
