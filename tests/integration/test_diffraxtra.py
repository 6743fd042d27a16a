"""diffraxtra's `DiffEqSolver` takes a `ParallelSolver`, and its vectorised dense output is that of its own solver."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffraxtra import DiffEqSolver

from ..problems import parallel_solver


TIMES = jnp.linspace(0.1, 5.9, 7)


def orbit(solver, vectorised):
    """The position at the end of an orbit of Kepler's problem, and its derivative by the mass of the sun."""

    def field(t, y, mass):
        position, velocity = y
        return velocity, -mass * position / jnp.sum(position**2) ** 1.5

    integrate = DiffEqSolver(solver, stepsize_controller=dfx.PIDController(rtol=1e-8, atol=1e-8), max_steps=512)

    def end(mass):
        y0 = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.2])
        saveat = dfx.SaveAt(t1=True, dense=vectorised)
        sol = integrate(
            *(dfx.ODETerm(field), 0.0, 6.0, None, y0, mass), saveat=saveat, vectorize_interpolation=vectorised
        )
        dense = sol.evaluate(TIMES)[0] if vectorised else None
        return sol.ys[0][-1, 0], dense

    return jax.value_and_grad(end, has_aux=True)(jnp.array(1.0))


@pytest.mark.parametrize("vectorised", [False, True])
def test_an_orbit_and_its_derivative(vectorised):
    (ours, our_dense), our_gradient = orbit(parallel_solver(dfx.Dopri5(), num_steps=32), vectorised)
    (theirs, their_dense), their_gradient = orbit(dfx.Dopri5(), vectorised)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(our_gradient, their_gradient, rtol=1e-5)
    if vectorised:
        np.testing.assert_allclose(our_dense, their_dense, atol=1e-6)
