"""Stiff initial value problems from the literature, with their usual time spans and initial states.

Robertson, HIRES, the Oregonator, E5 and van der Pol come from the test set of Mazzia and Magherini (Bari, 2008) and from
Hairer and Wanner, "Solving ordinary differential equations II".
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def _compiled(field: Callable) -> tuple[Callable, Callable]:
    """A field and its Jacobian, compiled once for all parameters."""
    return jax.jit(field), jax.jit(jax.jacfwd(field, argnums=1))


@dataclass(frozen=True)
class Stiff:
    """A field `field(t, y, args)`, its initial state, end time and parameters, and the absolute tolerance that goes with a
    relative tolerance of 1e-6."""

    field: Callable
    y0: np.ndarray
    t1: float
    atol: float = 1e-9
    args: np.ndarray | None = None

    @property
    def term(self) -> dfx.ODETerm:
        return dfx.ODETerm(self.field)

    def reference(self, rtol: float = 1e-12) -> np.ndarray:
        """The end state by SciPy's Radau method."""
        from scipy.integrate import solve_ivp

        field, jacobian = _compiled(self.field)
        solution = solve_ivp(
            lambda t, y: np.asarray(field(t, y, self.args)),
            (0.0, self.t1),
            self.y0,
            method="Radau",
            rtol=rtol,
            atol=1e-4 * rtol / 1e-6 * self.atol,
            jac=lambda t, y: np.asarray(jacobian(t, y, self.args)),
        )
        return solution.y[:, -1]

    def error(self, y, reference) -> float:
        """The largest component of `|y - reference| / (|reference| + 1e6 atol)`; infinite if it is not finite."""
        y = np.asarray(y, float).reshape(-1)
        error = np.max(np.abs(y - reference) / (np.abs(reference) + 1e6 * self.atol))
        return float(error) if np.isfinite(error) else float("inf")


def van_der_pol(t, y, mu):
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def robertson(t, y, rates):
    slow, fast, middle = rates[0] * y[0], rates[1] * y[1] ** 2, rates[2] * y[1] * y[2]
    return jnp.stack([middle - slow, slow - middle - fast, fast])


def hires(t, y, rates):
    k = rates
    a = k[3] * y[5] * y[7]
    return jnp.stack(
        [
            -k[0] * y[0] + 0.43 * y[1] + k[1] * y[2] + 0.0007,
            k[0] * y[0] - 8.75 * y[1],
            -10.03 * y[2] + 0.43 * y[3] + 0.035 * y[4],
            k[1] * y[1] + k[0] * y[2] - 1.12 * y[3],
            -1.745 * y[4] + 0.43 * y[5] + 0.43 * y[6],
            -a + k[2] * y[3] + k[0] * y[4] - 0.43 * y[5] + k[2] * y[6],
            a - 1.81 * y[6],
            -a + 1.81 * y[6],
        ]
    )


def oregonator(t, y, args):
    return jnp.stack(
        [
            77.27 * (y[1] + y[0] * (1 - 8.375e-6 * y[0] - y[1])),
            (y[2] - (1 + y[0]) * y[1]) / 77.27,
            0.161 * (y[0] - y[2]),
        ]
    )


def e5(t, y, args):
    a, b, c, cm = 7.89e-10 * y[0], 1.1e7 * y[0] * y[2], 1.13e3 * y[3], 1.13e9 * y[1] * y[2]
    return jnp.stack([-a - b, a - cm, a - b - cm + c, b - c])


def allen_cahn(t, y, width):
    """`u_t = width^2 u_xx + u - u^3` on `[-1, 1]` with no flux through the ends, discretised by second differences."""
    spacing = 2 / (y.shape[0] - 1)
    padded = jnp.concatenate([y[1:2], y, y[-2:-1]])
    return (width / spacing) ** 2 * (padded[2:] - 2 * y + padded[:-2]) + y - y**3


_RATES = np.array([0.04, 3e7, 1e4])
_X = np.linspace(-1, 1, 64)
PROBLEMS = {
    "van der Pol, mu = 10": Stiff(van_der_pol, np.array([2.0, 0.0]), 40.0, args=np.array(10.0)),
    "van der Pol, mu = 1000": Stiff(van_der_pol, np.array([2.0, 0.0]), 3000.0, args=np.array(1000.0)),
    "Robertson, T = 1e5": Stiff(robertson, np.array([1.0, 0.0, 0.0]), 1e5, 1e-12, _RATES),
    "Robertson, T = 1e11": Stiff(robertson, np.array([1.0, 0.0, 0.0]), 1e11, 1e-14, _RATES),
    "HIRES": Stiff(
        hires, np.array([1.0, 0, 0, 0, 0, 0, 0, 0.0057]), 321.8122, args=np.array([1.71, 8.32, 0.69, 280.0])
    ),
    "Oregonator": Stiff(oregonator, np.array([1.0, 2.0, 3.0]), 360.0),
    "E5": Stiff(e5, np.array([1.76e-3, 0.0, 0.0, 0.0]), 1e11, 1e-22),
    "Allen-Cahn, D = 64": Stiff(allen_cahn, 0.53 * _X + 0.47 * np.sin(-1.5 * np.pi * _X), 40.0, 1e-9, np.array(0.05)),
}
