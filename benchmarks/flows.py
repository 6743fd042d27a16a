"""Chaotic and other systems with known Lyapunov exponents: the flows of arXiv 2508.16817, table 1, and more.

The right-hand sides, parameters and initial states of the nine flows come from the `dysts` collection of chaotic systems
(Gilpin, arXiv 2110.05266), which that table uses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import diffrax as dfx
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Flow:
    """A vector field `field(y)`, an initial state on or near its attractor, and its largest Lyapunov exponent if that is
    well known."""

    field: Callable
    y0: np.ndarray
    exponent: float | None = None

    @property
    def term(self) -> dfx.ODETerm:
        return dfx.ODETerm(lambda t, y, args: self.field(y))


def abc(y):
    a, b, c = 1.73205, 1.41421, 1.0
    return jnp.stack(
        [
            a * jnp.sin(y[2]) + c * jnp.cos(y[1]),
            b * jnp.sin(y[0]) + a * jnp.cos(y[2]),
            c * jnp.sin(y[1]) + b * jnp.cos(y[0]),
        ]
    )


def chua(y):
    alpha, beta, m0, m1 = 15.6, 28.0, -1.142857, -0.71429
    ramp = m1 * y[0] + 0.5 * (m0 - m1) * (jnp.abs(y[0] + 1) - jnp.abs(y[0] - 1))
    return jnp.stack([alpha * (y[1] - y[0] - ramp), y[0] - y[1] + y[2], -beta * y[1]])


def kawczynski_strizhak(y):
    beta, gamma, kappa, mu = -0.4, 0.49, 0.2, 2.1
    return jnp.stack(
        [gamma * (y[1] - y[0] ** 3 + 3 * mu * y[0]), -2 * mu * y[0] - y[1] - y[2] + beta, kappa * (y[0] - y[2])]
    )


def lorenz63(y):
    return jnp.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])


def nose_hoover(y):
    return jnp.stack([y[1], -y[0] + y[1] * y[2], 1.5 - y[1] ** 2])


def roessler(y):
    return jnp.stack([-y[1] - y[2], y[0] + 0.2 * y[1], 0.2 + y[2] * (y[0] - 5.7)])


def sprott_b(y):
    return jnp.stack([y[1] * y[2], y[0] - y[1], 1 - y[0] * y[1]])


def thomas(y, damping=1.85, strength=10.0):
    return -damping * y + strength * jnp.sin(jnp.roll(y, -1))


def vallis(y):
    b, c, p = 102.0, 3.0, 0.0
    return jnp.stack([b * y[1] - c * (y[0] + p), -y[1] + y[0] * y[2], -y[2] - y[0] * y[1] + 1])


def lorenz96(y, forcing=8.0):
    return (jnp.roll(y, -1) - jnp.roll(y, 2)) * jnp.roll(y, 1) - y + forcing


def van_der_pol(y):
    return jnp.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])


def pendulum(y):
    return jnp.stack([y[1], -0.3 * y[1] - jnp.sin(y[0])])


def linear(y):
    return jnp.array([[-0.5, 1.0, 0.0], [0.0, -1.0, 2.0], [0.0, 0.0, -3.0]]) @ y


NINE_FLOWS = {
    "ABC": Flow(abc, np.array([-0.78450179, -0.62887672, -0.17620268])),
    "Chua": Flow(chua, np.array([1.1262351, -0.11386474, -0.78324421])),
    "Kawczynski-Strizhak": Flow(kawczynski_strizhak, np.array([-1.160501, 5.8636902, -1.2031947])),
    "Lorenz-63": Flow(lorenz63, np.array([-9.7869288, -15.03852, 20.533978]), 0.9056),
    "Nose-Hoover": Flow(nose_hoover, np.array([-1.9758582, 0.24647527, 0.79024299])),
    "Roessler": Flow(roessler, np.array([6.5134412, 0.4772013, 0.34164294]), 0.0714),
    "Sprott B": Flow(sprott_b, np.array([1.6878282, 1.4848132, -0.53706628])),
    "Thomas": Flow(thomas, np.array([2.199442, 2.3634225, 3.220197])),
    "Vallis": Flow(vallis, np.array([-6.99286331487343, 0.023254276622294345, -0.1658177563067799])),
}
