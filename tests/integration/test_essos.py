"""ESSOS traces magnetic field lines through our `diffeqsolve`, and takes a `ParallelSolver` as its solver."""

import os


# Read when a trace begins.
os.environ["ESSOS_PROGRESS"] = "0"

import diffrax as dfx
import essos.dynamics
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from essos.coils import Coils, CreateEquallySpacedCurves
from essos.fields import BiotSavart

import parallel_diffrax as pdx

from ..problems import parallel_solver


CURVES = CreateEquallySpacedCurves(2, 1, 1.0, 0.4, n_segments=20, nfp=2, stellsym=True)
STARTS = jnp.array([[1.05, 0.0, 0.0], [1.1, 0.0, 0.05]])


def trace(starts, model, solver=None):
    """Field lines of eight coils on a torus, about once around."""
    field = BiotSavart(Coils(CURVES, jnp.array([1e6, 1e6])))
    lines = essos.dynamics.Tracing(
        **dict(field=field, model=model, initial_conditions=starts, maxtime=3.0, timestep=0.05, times_to_trace=6),
        **dict(solver=solver, rtol=1e-10, atol=1e-10, max_steps=1024, progress=False),
    )
    return lines.trajectories


def assert_same(ours, theirs, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.all(np.isfinite(b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def with_derivative(model):
    def end(starts):
        lines = trace(starts, model, dfx.Dopri5())
        return jnp.sum(lines[:, -1] ** 2), lines

    return jax.value_and_grad(end, has_aux=True)(STARTS)


@pytest.mark.parametrize("model, tolerance", [("FieldLine", 1e-10), ("FieldLineAdaptative", 1e-6)])
def test_field_lines_and_their_derivatives(monkeypatch, model, tolerance):
    parallel = []

    def solve(*args, **kwargs):
        sol = pdx.diffeqsolve(*args, **kwargs)
        parallel.append("windows" in sol.stats)
        return sol

    theirs = with_derivative(model)
    monkeypatch.setattr(essos.dynamics, "diffeqsolve", solve)
    assert_same(with_derivative(model), theirs, tolerance)
    assert parallel and all(parallel)


def test_a_parallel_solver_as_their_solver():
    # With tolerances of its own, a root finder weights errors otherwise than the controller, and windows become tiny.
    root_finder = dfx.with_stepsize_controller_tols(pdx.ParallelNewton)()
    solver = parallel_solver(dfx.Dopri5(), num_steps=16, root_finder=root_finder)
    ours = trace(STARTS, "FieldLineAdaptative", solver)
    assert_same(ours, trace(STARTS, "FieldLineAdaptative", dfx.Dopri5()), 1e-6)
