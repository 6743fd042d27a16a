"""The recurrences on which the benchmarks compare the family of methods."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import parallel_diffrax as pdx


@dataclass(frozen=True)
class Problem:
    """The recurrence `y <- step(y, x)` from `init`, for the rows `x` of `xs`. The state consists of `parts` vectors."""

    step: Callable[[Array, Array], Array]
    init: Array
    xs: Array
    parts: int = 1

    def sequential(self) -> Array:
        """All states, by `lax.scan`."""

        def body(y, x):
            y = self.step(y, x)
            return y, y

        return jax.lax.scan(body, self.init, self.xs)[1]

    def residual(self, y: Array, args: tuple[Array, Array]) -> Array:
        """`F(y[i-1], x[i]) - y[i]`, for `optimistix.root_find` with `args = (init, xs)`."""
        init, xs = args
        return jax.vmap(self.step)(jnp.concatenate([init[None], y[:-1]]), xs) - y


def approximations(size: int, parts: int = 1) -> dict[str, pdx.jacobians.AbstractJacobian]:
    """The exact Jacobian of a step, and every approximation. A block has two components: one from each part of a state of
    two parts, else two neighbours."""
    blocks = pdx.jacobians.BlockDiagonal
    return {
        "Dense": pdx.jacobians.Dense(),
        "BlockDiagonal": blocks.of_parts(size) if parts == 2 else blocks.of_consecutive(size, 2),
        "Diagonal": pdx.jacobians.Diagonal(),
        "Hutchinson(4)": pdx.jacobians.Hutchinson(4, jax.random.key(0)),
        "Clipped": pdx.jacobians.Clipped(),
        "Scaled(0.1)": pdx.jacobians.Scaled(0.1),
        "Identity": pdx.jacobians.Identity(),
        "Zero": pdx.jacobians.Zero(),
    }


def mlp(num_steps: int = 2000, size: int = 16) -> Problem:
    """A contracting network with one hidden layer, driven by noise."""
    rng = np.random.default_rng(0)
    first = jnp.asarray(rng.normal(size=(32, size)) / np.sqrt(size))
    second = jnp.asarray(rng.normal(size=(size, 32)) * 0.4 / np.sqrt(32))
    xs = jnp.asarray(0.5 * rng.normal(size=(num_steps, size)))
    return Problem(lambda y, x: second @ jnp.tanh(first @ y + x[0]) + 0.3 * y + x, jnp.zeros(size), xs)


def gru(num_steps: int = 4000, size: int = 32, gain: float = 0.5, seed: int = 0) -> Problem:
    """A gated recurrent unit with random weights, driven by noise. A gain above 2 makes it unstable over some segments."""
    rng = np.random.default_rng(seed)
    update, reset, candidate = (jnp.asarray(gain * rng.normal(size=(size, size)) / np.sqrt(size)) for _ in range(3))
    xs = jnp.asarray(rng.normal(size=(num_steps, size)))

    def step(h, x):
        z, r = jax.nn.sigmoid(update @ h + x), jax.nn.sigmoid(reset @ h + x)
        return (1 - z) * h + z * jnp.tanh(candidate @ (r * h) + x)

    return Problem(step, jnp.full(size, 0.1), xs)


def langevin(num_steps: int = 10_000, size: int = 2, dt: float = 0.01) -> Problem:
    """The unadjusted Langevin chain of the two-well potential `sum((y^2 - 1)^2 / 4)` at temperature 1."""
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(num_steps, size)))
    return Problem(lambda y, x: y + dt * (y - y**3) + jnp.sqrt(2 * dt) * x, jnp.ones(size), noise)


def oscillator(num_steps: int = 2000, size: int = 2, dt: float = 0.05) -> Problem:
    """Harmonic oscillators by the leapfrog method. The state holds all positions, then all velocities."""
    frequency = 1.0 + 0.1 * jnp.arange(size // 2, dtype=float)

    def step(y, _):
        q, p = jnp.split(y, 2)
        p = p - dt / 2 * frequency**2 * q
        q = q + dt * p
        return jnp.concatenate([q, p - dt / 2 * frequency**2 * q])

    return Problem(step, jnp.ones(size), jnp.zeros((num_steps, 0)), parts=2)


def _heun(field, dt):
    def step(y, _):
        k = field(y)
        return y + dt / 2 * (k + field(y + dt * k))

    return step


def _fitzhugh_nagumo(y):
    return jnp.stack([y[0] - y[0] ** 3 / 3 - y[1] + 0.5, 0.08 * (y[0] + 0.7 - 0.8 * y[1])])


def fitzhugh_nagumo(num_steps: int = 4096, time: float = 100.0) -> Problem:
    """The FitzHugh-Nagumo oscillator by Heun's method, over two to three spikes."""
    step = _heun(_fitzhugh_nagumo, time / num_steps)
    return Problem(step, jnp.array([-1.0, 1.0]), jnp.zeros((num_steps, 0)))


def tanh(num_steps: int) -> Problem:
    """`y <- 1.6 tanh(y) + 0.3 sin(0.7 i)`, unstable near zero, with two stable branches."""
    xs = jnp.arange(float(num_steps))[:, None]
    return Problem(lambda y, x: 1.6 * jnp.tanh(y) + 0.3 * jnp.sin(0.7 * x), jnp.array([0.1]), xs)


def van_der_pol(num_steps: int = 4000, dt: float = 0.01) -> Problem:
    """The van der Pol oscillator with `mu = 1` by Euler's method."""

    def step(y, _):
        return y + dt * jnp.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])

    return Problem(step, jnp.array([2.0, 0.0]), jnp.zeros((num_steps, 0)))


TABLE = {"MLP": mlp, "GRU": gru, "Langevin": langevin, "oscillator": oscillator, "FitzHugh-Nagumo": fitzhugh_nagumo}
UNSTABLE = {
    "unstable GRU": lambda: gru(1000, 4, 4.0, 1),
    "tanh, N = 60": lambda: tanh(60),
    "tanh, N = 2000": lambda: tanh(2000),
    "van der Pol": van_der_pol,
    "FitzHugh-Nagumo": fitzhugh_nagumo,
}
