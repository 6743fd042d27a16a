"""Diffrax's own examples, with only the import of `diffeqsolve` changed: the same numbers and the same gradients.

The calls are those of the examples in Diffrax's documentation; the data and the small networks are ours.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx


def network(inputs, outputs, seed=0):
    return eqx.nn.MLP(inputs, outputs, width_size=4, depth=1, activation=jnp.tanh, key=jax.random.key(seed))


def compare(loss, parameters, tolerance, parallel=True):
    """`loss(parameters, diffeqsolve)` and its gradient, by either function."""
    kinds = []

    def ours(*args, **kwargs):
        sol = pdx.diffeqsolve(*args, **kwargs)
        kinds.append("windows" in sol.stats)
        return sol

    (value, gradient), (expected, expected_gradient) = (
        eqx.filter_value_and_grad(loss)(parameters, solve) for solve in (ours, dfx.diffeqsolve)
    )
    assert kinds and all(kind == parallel for kind in kinds)
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    leaves, expected_leaves = (jax.tree.leaves(eqx.filter(g, eqx.is_array)) for g in (gradient, expected_gradient))
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in expected_leaves)
    assert scale > 1e-6
    for a, b in zip(leaves, expected_leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.full
def test_a_neural_ode():
    """Adaptive steps, outputs at given times, a batch of initial values."""
    ts = jnp.linspace(0.0, 2.0, 6)
    y0s = jnp.array([[1.0, 0.0], [0.5, -0.5]])
    data = jnp.stack([jnp.cos(ts), -jnp.sin(ts)], axis=1)

    def loss(model, diffeqsolve):
        def predict(ts, y0):
            solution = diffeqsolve(
                dfx.ODETerm(lambda t, y, args: model(y)),
                dfx.Tsit5(),
                t0=ts[0],
                t1=ts[-1],
                dt0=ts[1] - ts[0],
                y0=y0,
                stepsize_controller=dfx.PIDController(rtol=1e-7, atol=1e-9),
                saveat=dfx.SaveAt(ts=ts),
            )
            return solution.ys

        return jnp.mean((jax.vmap(predict, in_axes=(None, 0))(ts, y0s) - data[None]) ** 2)

    compare(loss, network(2, 2), 1e-5)


@pytest.mark.full
def test_a_latent_ode():
    """A fixed step size, decoded outputs."""
    ts = jnp.linspace(0.0, 1.3, 5)
    key = jax.random.key(1)

    def loss(model, diffeqsolve):
        func, decoder, latent = model
        y0 = latent + 0.1 * jax.random.normal(key, (3,))
        sol = diffeqsolve(
            dfx.ODETerm(lambda t, y, args: jax.nn.sigmoid(func(y))),
            dfx.Tsit5(),
            0,
            ts[-1],
            dt0=0.4,
            y0=y0,
            saveat=dfx.SaveAt(ts=ts),
        )
        return jnp.sum(jax.vmap(decoder)(sol.ys) ** 2)

    model = network(3, 3), eqx.nn.Linear(3, 2, key=key), jnp.array([0.1, 0.2, 0.3])
    compare(loss, model, 1e-9)


@pytest.mark.full
def test_a_continuous_normalising_flow():
    """Backward in time, a pair of a state and its log-density, the exact divergence."""

    def loss(model, diffeqsolve):
        def field(t, y, args):
            y, _ = y
            f, vjp = jax.vjp(lambda y: model(jnp.append(y, t)), y)
            (jacobian,) = jax.vmap(vjp)(jnp.eye(2))
            return f, jnp.trace(jacobian)

        def log_density(y):
            sol = diffeqsolve(dfx.ODETerm(field), dfx.Tsit5(), 0.5, 0.0, -0.05, (y, jnp.zeros(())))
            (y,), (change,) = sol.ys
            return change - 0.5 * jnp.sum(y**2)

        return -jnp.mean(jax.vmap(log_density)(jnp.array([[0.3, -1.0], [1.2, 0.4]])))

    compare(loss, network(3, 2), 1e-9)


@pytest.mark.full
def test_a_neural_controlled_differential_equation():
    """The control is a cubic interpolation of data."""
    ts = jnp.linspace(0.0, 2.0, 9)
    path = jnp.stack([ts, jnp.sin(3 * ts)], axis=1)
    coefficients = dfx.backward_hermite_coefficients(ts, path)

    def loss(model, diffeqsolve):
        func, linear = model
        control = dfx.CubicInterpolation(ts, coefficients)
        term = dfx.ControlTerm(lambda t, y, args: func(y).reshape(3, 2), control).to_ode()
        solution = diffeqsolve(
            term,
            dfx.Tsit5(),
            ts[0],
            ts[-1],
            None,
            jnp.array([0.1, -0.2, 0.3]),
            stepsize_controller=dfx.PIDController(rtol=1e-7, atol=1e-9),
            saveat=dfx.SaveAt(t1=True),
        )
        return jax.nn.softplus(linear(solution.ys[-1])[0])

    compare(loss, (network(3, 6), eqx.nn.Linear(3, 1, key=jax.random.key(2))), 1e-5)


@pytest.mark.full
def test_a_neural_stochastic_differential_equation():
    """Itô noise by Euler's method, a Brownian path for each sample."""

    def loss(model, diffeqsolve):
        drift, diffusion = model

        def sample(key):
            path = dfx.VirtualBrownianTree(0.0, 1.0, tol=0.05 / 2, shape=(2,), key=key)
            terms = dfx.MultiTerm(
                dfx.ODETerm(lambda t, y, args: drift(y)),
                dfx.ControlTerm(lambda t, y, args: 0.3 * diffusion(y).reshape(2, 2), path),
            )
            saveat = dfx.SaveAt(ts=jnp.linspace(0.0, 1.0, 5))
            return diffeqsolve(terms, dfx.EulerHeun(), 0.0, 1.0, 0.05, jnp.array([1.0, 0.5]), saveat=saveat).ys

        return jnp.mean(jax.vmap(sample)(jax.random.split(jax.random.key(3), 2)) ** 2)

    compare(loss, (network(2, 2), network(2, 4, 1)), 1e-9)


@pytest.mark.full
def test_a_kalman_filter():
    """The state and its covariance between measurements, in `lax.scan`."""
    times = jnp.linspace(0.0, 1.0, 5)
    measurements = jnp.cos(3 * times[1:])
    transition, noise = jnp.array([[0.0, 1.0], [-9.0, -0.1]]), 0.01 * jnp.eye(2)

    def loss(variance, diffeqsolve):
        def field(t, y, args):
            mean, covariance = y
            change = transition @ covariance
            return transition @ mean, change + change.T + noise

        def filter_step(y, interval):
            t0, t1, measured = interval
            sol = diffeqsolve(dfx.ODETerm(field), dfx.Tsit5(), t0, t1, 0.02, y)
            (mean,), (covariance,) = sol.ys
            innovation, scale = measured - mean[0], covariance[0, 0] + variance
            gain = covariance[:, 0] / scale
            y = mean + gain * innovation, covariance - jnp.outer(gain, covariance[0])
            return y, innovation**2 / scale + jnp.log(scale)

        y0 = jnp.array([0.5, 0.0]), jnp.eye(2)
        return jnp.sum(jax.lax.scan(filter_step, y0, (times[:-1], times[1:], measurements))[1])

    compare(loss, jnp.array(0.1), 1e-8)


@pytest.mark.full
def test_a_steady_state():
    """An event ends the solve where the field vanishes. The adjoint of the example, `ImplicitAdjoint`, is Diffrax's own; the
    default one is parallel."""
    event = dfx.Event(dfx.steady_state_event(rtol=1e-6, atol=1e-8, norm=optx.rms_norm))

    def loss(target, diffeqsolve, adjoint):
        term = dfx.ODETerm(lambda t, y, args: args - y - 0.1 * y**3)
        sol = diffeqsolve(
            term, dfx.Tsit5(), 0, jnp.inf, 0.1, 1.0, args=target, event=event, max_steps=512, adjoint=adjoint
        )
        return sol.ys[-1]

    compare(lambda target, solve: loss(target, solve, dfx.RecursiveCheckpointAdjoint()), jnp.array(0.7), 1e-9)
    # `ImplicitAdjoint` itself promotes types.
    with jax.numpy_dtype_promotion("standard"):
        compare(lambda target, solve: loss(target, solve, dfx.ImplicitAdjoint()), jnp.array(0.7), 0, parallel=False)


@pytest.mark.full
def test_fitting_the_parameters_of_a_symbolic_expression():
    """What symbolic regression does for each candidate: a fixed step size and a search for its constants."""
    ts = jnp.linspace(0.0, 1.0, 5)
    data = jnp.stack([jnp.cos(2 * ts), -2 * jnp.sin(2 * ts)], axis=1)

    def residual(constants, diffeqsolve, adjoint=dfx.ForwardMode()):
        term = dfx.ODETerm(lambda t, y, c: jnp.stack([c[0] * y[1], -c[1] * y[0]]))
        sol = diffeqsolve(
            *(term, dfx.Heun(), 0.0, 1.0, 0.02, jnp.array([1.0, 0.0]), constants),
            saveat=dfx.SaveAt(ts=ts),
            adjoint=adjoint,
        )
        return (sol.ys - data).reshape(-1)

    guess = jnp.array([0.8, 3.5])
    reverse = dfx.RecursiveCheckpointAdjoint()
    compare(lambda constants, solve: jnp.sum(residual(constants, solve, reverse) ** 2), guess, 1e-9)
    fits = [
        optx.least_squares(residual, optx.LevenbergMarquardt(1e-8, 1e-8), guess, args=solve).value
        for solve in (pdx.diffeqsolve, dfx.diffeqsolve)
    ]
    np.testing.assert_allclose(fits[0], fits[1], rtol=1e-6)
    np.testing.assert_allclose(fits[0], [1.0, 4.0], atol=2e-2)
