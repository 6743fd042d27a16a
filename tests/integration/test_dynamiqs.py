"""dynamiqs solves Schrödinger's and Lindblad's equations through our `diffeqsolve`."""

import types

import diffrax as dfx
import dynamiqs as dq
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dynamiqs.integrators.core import diffrax_integrator

import parallel_diffrax as pdx


TIMES = jnp.linspace(0.0, 2.0, 5)
# The default, without the progress bar.
OPTIONS = dict(exp_ops=[dq.sigmaz()], progress_meter=False)


@pytest.fixture(autouse=True)
def double_precision():
    dq.set_precision("double")


@pytest.fixture
def our_diffeqsolve(monkeypatch):
    """Changes the `diffeqsolve` that dynamiqs imported. Returns a function that does it, and one that undoes it."""
    parallel = []

    def solve(*args, **kwargs):
        sol = pdx.diffeqsolve(*args, **kwargs)
        parallel.append("windows" in sol.stats)
        return sol

    names = {name: getattr(dfx, name) for name in dir(dfx) if not name.startswith("_")}
    changed = types.SimpleNamespace(**{**names, "diffeqsolve": solve})

    def both(function):
        theirs = function()
        with monkeypatch.context() as patch:
            patch.setattr(diffrax_integrator, "dx", changed)
            ours = function()
        assert parallel and all(parallel)
        return ours, theirs

    return both


def driven(amplitude):
    """A qubit driven near resonance."""
    return 0.5 * dq.sigmaz() + dq.modulated(lambda t: amplitude * jnp.cos(t), dq.sigmax())


@pytest.mark.parametrize("method, tolerance", [(dq.method.Tsit5(), 1e-5), (dq.method.Euler(dt=0.02), 1e-11)])
def test_a_driven_qubit_and_its_derivative_by_the_drive(our_diffeqsolve, method, tolerance):
    def excitation(amplitude):
        result = dq.sesolve(driven(amplitude), dq.basis(2, 0), TIMES, method=method, **OPTIONS)
        return result.expects[0, -1].real, result.expects[0]

    ours, theirs = our_diffeqsolve(lambda: jax.value_and_grad(excitation, has_aux=True)(0.7))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


def test_a_qubit_that_decays(our_diffeqsolve):
    def excitation():
        decay = [jnp.sqrt(0.3) * dq.sigmam()]
        return dq.mesolve(driven(0.7), decay, dq.basis(2, 0), TIMES, method=dq.method.Tsit5(), **OPTIONS).expects

    ours, theirs = our_diffeqsolve(excitation)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
