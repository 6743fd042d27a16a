"""Derivatives through `ParallelSolver` are Diffrax's own, in every mode, through every input.

Against sequential Diffrax on the same grid (`RecursiveCheckpointAdjoint`), to 1e-7 relative and usually to rounding.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, driven, DRIVEN_ARGS, DRIVEN_Y0


T1, NUM_STEPS = 8.0, 240
SAVED = dfx.SaveAt(ts=jnp.linspace(0.0, T1, 200))
BASE = dfx.Heun()
SOLVER = pdx.ParallelSolver(BASE, NUM_STEPS)


def parallel(y0, args, windows=1, solver=SOLVER, t0=0.0, t1=T1, **kwargs):
    return dfx.diffeqsolve(DRIVEN, solver, t0, t1, (t1 - t0) / windows, y0, args, max_steps=windows + 1, **kwargs)


def sequential(y0, args, num_steps=NUM_STEPS, t0=0.0, t1=T1, **kwargs):
    dt0 = (t1 - t0) / num_steps
    return dfx.diffeqsolve(DRIVEN, BASE, t0, t1, dt0, y0, args, max_steps=num_steps + 1, **kwargs)


def weighted(ys):
    weights = jnp.cos(jnp.arange(ys.size)).reshape(ys.shape)
    return jnp.sum(weights * ys) + jnp.sum(ys**2)


def close(got, want, tolerance=1e-9):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance * np.max(np.abs(w)))


@pytest.mark.parametrize("saveat", [dfx.SaveAt(t1=True), SAVED], ids=["final", "200 saved"])
def test_gradients_for_the_initial_state_and_arguments(saveat):
    def loss(solve):
        return lambda y0, args: weighted(solve(y0, args, saveat=saveat).ys)

    want = jax.grad(loss(sequential), argnums=(0, 1))(DRIVEN_Y0, DRIVEN_ARGS)
    got = jax.grad(loss(parallel), argnums=(0, 1))(DRIVEN_Y0, DRIVEN_ARGS)
    close(got, want)


def test_gradients_for_the_weights_of_a_neural_network_in_a_closure_and_in_the_arguments():
    network = eqx.nn.MLP(2, 2, 8, 1, activation=jnp.tanh, key=jax.random.key(0))
    ts = jnp.linspace(0.0, 4.0, 20)

    def loss(network, solver, dt0, in_closure):
        field = (lambda t, y, args: network(y)) if in_closure else (lambda t, y, args: args(y))
        args = None if in_closure else network
        saveat = dfx.SaveAt(ts=ts)
        sol = dfx.diffeqsolve(dfx.ODETerm(field), solver, 0.0, 4.0, dt0, DRIVEN_Y0, args, saveat=saveat, max_steps=64)
        return weighted(sol.ys)

    want = eqx.filter_grad(loss)(network, dfx.Heun(), 4.0 / 40, False)
    for in_closure in (True, False):
        close(eqx.filter_grad(loss)(network, pdx.ParallelSolver(dfx.Heun(), 40), 4.0, in_closure), want)


@pytest.mark.parametrize("adjoint", [dfx.ForwardMode(), dfx.DirectAdjoint()], ids=lambda a: type(a).__name__)
def test_forward_mode(adjoint):
    tangent = jnp.array([0.3, -1.0])

    def states(solve):
        return lambda args: solve(DRIVEN_Y0, args, saveat=SAVED, adjoint=adjoint).ys

    got = jax.jvp(states(parallel), (DRIVEN_ARGS,), (tangent,))
    want = jax.jvp(
        lambda a: sequential(DRIVEN_Y0, a, saveat=SAVED, adjoint=dfx.ForwardMode()).ys, (DRIVEN_ARGS,), (tangent,)
    )
    close(got, want)


def test_jacobians_and_hessians():
    small, adjoint = pdx.ParallelSolver(BASE, 20), dfx.DirectAdjoint()

    def ours(args):
        return parallel(DRIVEN_Y0, args, solver=small, t1=2.0, adjoint=adjoint).ys[-1]

    def theirs(args):
        return sequential(DRIVEN_Y0, args, num_steps=20, t1=2.0, adjoint=adjoint).ys[-1]

    jacobian = jax.jacrev(theirs)(DRIVEN_ARGS)
    close(jax.jacfwd(ours)(DRIVEN_ARGS), jacobian)
    close(*(jax.hessian(lambda args, f=f: weighted(f(args)))(DRIVEN_ARGS) for f in (ours, theirs)))


def test_gradients_for_the_times_agree_with_finite_differences():
    @jax.jit
    def loss(t0, t1):
        return weighted(parallel(DRIVEN_Y0, DRIVEN_ARGS, t0=t0, t1=t1).ys)

    t0, t1, h = jnp.array(0.1), jnp.array(7.9), 1e-5
    got = jax.grad(loss, argnums=(0, 1))(t0, t1)
    want = (
        (loss(t0 + h, t1) - loss(t0 - h, t1)) / (2 * h),
        (loss(t0, t1 + h) - loss(t0, t1 - h)) / (2 * h),
    )
    close(got, want, 1e-7)


def test_the_derivative_is_exact_when_steps_were_made_in_sequence():
    stubborn = pdx.ParallelSolver(BASE, NUM_STEPS, root_find_max_steps=1, predictor=pdx.ConstantPredictor())
    got = jax.grad(lambda a: weighted(parallel(DRIVEN_Y0, a, solver=stubborn).ys))(DRIVEN_ARGS)
    want = jax.grad(lambda a: weighted(sequential(DRIVEN_Y0, a).ys))(DRIVEN_ARGS)
    close(got, want)


def test_in_a_batch_a_member_that_fails_does_not_disturb_the_gradients_of_the_others():
    def field(t, y, args):
        return jnp.where(y[0] > 50, jnp.nan, driven(t, y, args))

    def loss(y0, args):
        sol = dfx.diffeqsolve(dfx.ODETerm(field), SOLVER, 0.0, T1, T1, y0, args, throw=False, max_steps=1)
        ok = sol.result == dfx.RESULTS.successful
        return jnp.where(ok, weighted(sol.ys), 0.0), ok

    y0s = jnp.stack([DRIVEN_Y0, jnp.array([49.9, 10.0]), 0.5 * DRIVEN_Y0])
    grads, ok = jax.vmap(jax.grad(loss, argnums=1, has_aux=True), in_axes=(0, None))(y0s, DRIVEN_ARGS)
    assert ok.tolist() == [True, False, True]
    want = jax.jit(jax.grad(lambda args, y0: weighted(sequential(y0, args).ys)))
    for k in (0, 2):
        close(grads[k], want(DRIVEN_ARGS, y0s[k]))


def test_gradients_through_rejected_windows():
    controller = dfx.PIDController(rtol=1e-9, atol=1e-9)

    def loss(args):
        solver = pdx.ParallelSolver(dfx.Tsit5(), 64)
        sol = dfx.diffeqsolve(
            DRIVEN, solver, 0.0, 30.0, 30.0, DRIVEN_Y0, args, stepsize_controller=controller, max_steps=64
        )
        return weighted(sol.ys), sol.stats["num_rejected_steps"]

    gradient, rejected = jax.grad(loss, has_aux=True)(DRIVEN_ARGS)
    assert int(rejected) > 0
    tight = dfx.PIDController(rtol=1e-11, atol=1e-11)
    want = jax.grad(
        lambda a: weighted(
            dfx.diffeqsolve(
                DRIVEN, dfx.Dopri8(), 0.0, 30.0, None, DRIVEN_Y0, a, stepsize_controller=tight, max_steps=4096
            ).ys
        )
    )(DRIVEN_ARGS)
    close(gradient, want, 1e-6)
