"""The initial value problems of the accuracy tables, and what tests share."""

from collections.abc import Callable
from dataclasses import dataclass

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx


# What a failed `eqx.error_if` becomes: under `eqx.filter_jit`, under `jax.jit`, and there in some versions of JAX.
FAILED_CHECK = (eqx.EquinoxRuntimeError, jax.errors.JaxRuntimeError, ValueError)


def parallel_solver(*args, policy=pdx.AdaptivePolicy(), **kwargs) -> pdx.ParallelSolver:
    """A `ParallelSolver` that solves in parallel where it can, also on a CPU, where the default makes steps sequentially."""
    return pdx.ParallelSolver(*args, policy=policy, **kwargs)


def only_full(*cases):
    """Cases of a parametrised test that repeat a claim: `make test` leaves them to `make test-all`."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full) for case in cases]


@dataclass(frozen=True)
class Problem:
    """A field, a solver that suits it, an initial state, a time span and a number of fixed steps."""

    field: Callable
    solver: dfx.AbstractSolver
    y0: np.ndarray
    t1: float
    num_steps: int
    tolerance: float = 1e-9

    @property
    def term(self):
        return dfx.ODETerm(lambda t, y, args: self.field(t, y))


def fitzhugh_nagumo(t, y):
    return jnp.stack([y[0] - y[0] ** 3 / 3 - y[1] + 0.5, 0.08 * (y[0] + 0.7 - 0.8 * y[1])])


def lotka_volterra(t, y):
    return jnp.stack([1.5 * y[0] - y[0] * y[1], -3 * y[1] + y[0] * y[1]])


def van_der_pol(mu):
    return lambda t, y: jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def lorenz(t, y):
    return jnp.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])


def kepler(t, y):
    cubed = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return jnp.stack([y[2], y[3], -y[0] / cubed, -y[1] / cubed])


def _mlp():
    rng = np.random.default_rng(0)
    first, bias = rng.normal(size=(32, 16)) / 4, rng.normal(size=32)
    second = rng.normal(size=(16, 32)) * 0.27

    def field(t, y):
        first_, bias_, second_ = (jnp.asarray(w, y.dtype) for w in (first, bias, second))
        return second_ @ jnp.tanh(first_ @ y + bias_) - 0.5 * y

    return field, rng.normal(size=16)


def heat(t, y):
    """The heat equation on the unit interval, 32 inner points, zero at the ends."""
    padded = jnp.pad(y, 1)
    return (padded[2:] - 2 * y + padded[:-2]) * 33.0**2


_POINTS = np.arange(1, 33) / 33
_MLP_FIELD, _MLP_Y0 = _mlp()

PROBLEMS = {
    "FitzHugh-Nagumo": Problem(fitzhugh_nagumo, dfx.Tsit5(), np.array([-1.0, 1.0]), 400.0, 16384),
    "Lotka-Volterra": Problem(lotka_volterra, dfx.Tsit5(), np.array([1.0, 1.0]), 200.0, 16384),
    "van der Pol, mu = 1": Problem(van_der_pol(1.0), dfx.Tsit5(), np.array([2.0, 0.0]), 20.0, 16384),
    "van der Pol, mu = 5": Problem(van_der_pol(5.0), dfx.Tsit5(), np.array([2.0, 0.0]), 50.0, 16384),
    "Lorenz-63": Problem(lorenz, dfx.Tsit5(), np.ones(3), 10.0, 16384, 1e-8),
    "Kepler, e = 0.6": Problem(kepler, dfx.Tsit5(), np.array([0.4, 0.0, 0.0, 2.0]), 20 * np.pi, 16384),
    "MLP": Problem(_MLP_FIELD, dfx.Tsit5(), _MLP_Y0, 20.0, 4096),
    # The largest stable step of Heun's method is 1 / (2 * 33^2).
    "heat": Problem(
        heat, dfx.Heun(), np.sin(np.pi * _POINTS) + 0.3 * np.sin(5 * np.pi * _POINTS), 0.45 * 4096 / 33**2, 4096
    ),
}


def driven(t, y, args):
    """A nonlinear oscillator that depends on time and has two parameters: small, smooth, cheap to compile."""
    return jnp.stack([y[1], -args[0] * jnp.sin(y[0]) - args[1] * y[1] + 0.3 * jnp.cos(t)])


DRIVEN = dfx.ODETerm(driven)
DRIVEN_Y0 = jnp.array([1.0, 0.2])
DRIVEN_ARGS = jnp.array([1.3, 0.1])


def relative_difference(a, b) -> float:
    """The largest difference, relative to one plus the magnitude of `b`. NumPy's maximum keeps NaN."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.max(np.abs(a - b) / (1 + np.abs(b))))
