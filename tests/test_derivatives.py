"""Derivatives through `ParallelSolver` are Diffrax's own, in every mode, through every input.

Against sequential Diffrax on the same grid (`RecursiveCheckpointAdjoint`, or forward mode), to 1e-7 relative and usually to
rounding.
"""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import parallel_diffrax as pdx

from .problems import DRIVEN, driven, DRIVEN_ARGS, DRIVEN_Y0, only_full, parallel_solver


T1, NUM_STEPS = 8.0, 240
SAVED = dfx.SaveAt(ts=jnp.linspace(0.0, T1, 200))
BASE = dfx.Bosh3()
# Derivatives do not depend on how the solution was found: the cheapest guess and policy to compile, where defaults are not
# what is tested.
CHEAP = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}
SOLVER, PLAIN = parallel_solver(BASE, NUM_STEPS), parallel_solver(BASE, NUM_STEPS, **CHEAP)


def parallel(y0, args, windows=1, solver=PLAIN, t0=0.0, t1=T1, **kwargs):
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


@functools.cache
def sequential_gradient():
    """Of the weighted final state, for the initial state and the arguments."""
    loss = lambda y0, args, t0, t1: weighted(sequential(y0, args, t0=t0, t1=t1).ys)
    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def test_gradients_of_the_final_state_for_the_initial_state_the_arguments_and_the_times():
    def loss(y0, args, t0, t1):
        return weighted(parallel(y0, args, solver=SOLVER, t0=t0, t1=t1).ys)

    # One program for the gradient and for the values that it is compared to.
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))

    def value(t0, t1):
        return both(DRIVEN_Y0, DRIVEN_ARGS, t0, t1)[0]

    t0, t1, h = jnp.array(0.1), jnp.array(7.9), 1e-5
    got = both(DRIVEN_Y0, DRIVEN_ARGS, t0, t1)[1]
    close(got[:2], sequential_gradient()(DRIVEN_Y0, DRIVEN_ARGS, t0, t1))
    # For the times, finite differences.
    want = ((value(t0 + h, t1) - value(t0 - h, t1)) / (2 * h), (value(t0, t1 + h) - value(t0, t1 - h)) / (2 * h))
    close(got[2:], want, 1e-7)


def test_the_derivative_is_exact_when_steps_were_made_in_sequence():
    options = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelThenSequential()}
    stubborn = parallel_solver(BASE, NUM_STEPS, root_find_max_steps=1, **options)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(args):
        sol = parallel(DRIVEN_Y0, args, solver=stubborn, saveat=dfx.SaveAt(t1=True, solver_state=True))
        return weighted(sol.ys), pdx.statistics(sol).sequential_steps

    got, steps = gradient(DRIVEN_ARGS)
    assert int(steps) > 0
    want = sequential_gradient()(DRIVEN_Y0, DRIVEN_ARGS, jnp.array(0.0), jnp.array(T1))[1]
    close(got, want)


def test_in_a_batch_a_member_that_fails_does_not_disturb_the_gradients_of_the_others():
    options = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelThenSequential()}
    solver = parallel_solver(BASE, NUM_STEPS, **options)

    def field(t, y, args):
        return jnp.where(y[0] > 50, jnp.nan, driven(t, y, args))

    def loss(y0, args):
        sol = dfx.diffeqsolve(dfx.ODETerm(field), solver, 0.0, T1, T1, y0, args, throw=False, max_steps=1)
        ok = sol.result == dfx.RESULTS.successful
        return jnp.where(ok, weighted(sol.ys), 0.0), ok

    y0s = jnp.stack([DRIVEN_Y0, jnp.array([49.9, 10.0]), 0.5 * DRIVEN_Y0])
    gradients = jax.jit(jax.vmap(jax.grad(loss, argnums=1, has_aux=True), in_axes=(0, None)))
    grads, ok = gradients(y0s, DRIVEN_ARGS)
    assert ok.tolist() == [True, False, True]
    for k in (0, 2):
        close(grads[k], sequential_gradient()(y0s[k], DRIVEN_ARGS, jnp.array(0.0), jnp.array(T1))[1])


@functools.cache
def sequential_jacobians():
    """Of the 200 saved states, in forward mode: the states; their derivatives for the initial state and the arguments."""
    states = lambda y0, args: sequential(y0, args, saveat=SAVED, adjoint=dfx.ForwardMode()).ys
    both = jax.jacfwd(lambda *inputs: 2 * (states(*inputs),), argnums=(0, 1), has_aux=True)
    return jax.jit(both)(DRIVEN_Y0, DRIVEN_ARGS)[::-1]


@pytest.mark.full
def test_gradients_of_200_saved_states_for_the_initial_state_and_arguments():
    loss = lambda y0, args: weighted(parallel(y0, args, saveat=SAVED).ys)
    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(DRIVEN_Y0, DRIVEN_ARGS)
    ys, jacobians = sequential_jacobians()
    close(got, [jnp.tensordot(jax.grad(weighted)(ys), jacobian, ys.ndim) for jacobian in jacobians])


def test_forward_mode():
    # Through `DirectAdjoint`, forward derivatives are those of the Jacobians below.
    adjoint = dfx.ForwardMode()
    tangent = jnp.array([0.3, -1.0])

    @jax.jit
    def tangents(args):
        states = lambda args: parallel(DRIVEN_Y0, args, saveat=SAVED, adjoint=adjoint).ys
        return jax.jvp(states, (args,), (tangent,))

    ys, (_, jacobian) = sequential_jacobians()
    close(tangents(DRIVEN_ARGS), (ys, jacobian @ tangent))


def test_jacobians_and_hessians():
    small = parallel_solver(BASE, 20, **CHEAP)

    def ours(args):
        return parallel(DRIVEN_Y0, args, solver=small, t1=2.0, adjoint=dfx.DirectAdjoint()).ys[-1]

    def theirs(args):
        return sequential(DRIVEN_Y0, args, num_steps=20, t1=2.0, adjoint=dfx.ForwardMode()).ys[-1]

    def derivatives(f, inner):
        hessian = lambda f: jax.jacfwd(inner(f))
        both = jax.jit(lambda args: (jax.jacfwd(f)(args), hessian(lambda a: weighted(f(a)))(args)))
        return both(DRIVEN_ARGS)

    close(derivatives(ours, jax.jacrev), derivatives(theirs, jax.jacfwd))


def test_gradients_through_rejected_windows():
    controller = dfx.PIDController(rtol=1e-9, atol=1e-9)
    options = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelThenSequential()}
    solver = parallel_solver(dfx.Tsit5(), 64, **options)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(args):
        sol = dfx.diffeqsolve(
            DRIVEN, solver, 0.0, 30.0, 30.0, DRIVEN_Y0, args, stepsize_controller=controller, max_steps=64
        )
        return weighted(sol.ys), sol.stats["num_rejected_steps"]

    got, rejected = gradient(DRIVEN_ARGS)
    assert int(rejected) > 0
    # Of tight solves in SciPy, by complex steps.
    want = []
    for direction in 1e-30j * np.eye(2):
        a, b = np.asarray(DRIVEN_ARGS) + direction
        field = lambda t, y, a=a, b=b: np.array([y[1], -a * np.sin(y[0]) - b * y[1] + 0.3 * np.cos(t)])
        y0 = np.asarray(DRIVEN_Y0, complex)
        end = scipy.integrate.solve_ivp(field, (0.0, 30.0), y0, "DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
        want.append(np.sum(np.cos(np.arange(2)) * end + end**2).imag / 1e-30)
    close(got, np.array(want), 1e-6)


@pytest.mark.parametrize(
    "predictor", only_full(pdx.CoarsePredictor(), pdx.AdaptivePredictor()), ids=["coarse", "adaptive"]
)
def test_no_derivative_enters_the_first_guess_of_a_field_that_closes_over_what_is_differentiated(predictor):
    def loss(rate, closed):
        field = lambda t, y, args: jnp.stack([y[1], (rate if closed else args) * jnp.cos(t) - y[0]])
        solver = parallel_solver(dfx.Heun(), 32, predictor=predictor, policy=pdx.policies.ParallelOnly())
        adjoint = dfx.DirectAdjoint()
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field), solver, 0.0, 2.0, 2.0, jnp.ones(2), rate, max_steps=1, adjoint=adjoint
        )
        return jnp.sum(sol.ys**2)

    closed, as_argument = (
        jax.jit(jax.grad(lambda rate, closed=closed: loss(rate, closed)))(0.7) for closed in (True, False)
    )
    np.testing.assert_allclose(closed, as_argument, rtol=1e-12)


@pytest.mark.full
def test_gradients_for_the_weights_of_a_neural_network_in_a_closure_and_in_the_arguments():
    keys = jax.random.split(jax.random.key(0))
    networks = tuple(eqx.nn.MLP(2, 2, 8, 1, activation=jnp.tanh, key=key) for key in keys)
    saveat = dfx.SaveAt(ts=jnp.linspace(0.0, 4.0, 20))

    weights, static = eqx.partition(networks, eqx.is_array)

    def derivative(mode, adjoint, solver, dt0, term, args):
        def loss(weights):
            networks = eqx.combine(weights, static)
            sol = dfx.diffeqsolve(
                term(networks), solver, 0.0, 4.0, dt0, DRIVEN_Y0, args(networks), saveat=saveat, max_steps=64,
                adjoint=adjoint,
            )  # fmt: skip
            return weighted(sol.ys)

        return jax.jit(mode(loss))(weights)

    got = derivative(
        jax.grad,
        dfx.RecursiveCheckpointAdjoint(),
        parallel_solver(BASE, 40, **CHEAP),
        4.0,
        lambda networks: dfx.ODETerm(lambda t, y, args: networks[0](y) + args(y)),
        lambda networks: networks[1],
    )
    want = derivative(
        jax.jacfwd,
        dfx.ForwardMode(),
        BASE,
        4.0 / 40,
        lambda networks: dfx.ODETerm(lambda t, y, args: args[0](y) + args[1](y)),
        lambda networks: networks,
    )
    close(got, want)
