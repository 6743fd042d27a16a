"""A neural ODE, trained on a recorded neuron: the membrane potential that Matplotlib ships among its sample data.

A neuron under constant current fires regularly: a limit cycle. The state is the potential now and twice before (a delay
embedding), smoothed and scaled; the vector field is a small network. Training solves windows of 30 ms from recorded states,
under the user's adaptive controller. Then the network runs freely for ten times as long.

Prints the losses, and how long a step of training takes beside plain Diffrax, with only the import changed. Draws the
recording and the free run.

    python examples/recorded_neuron.py [picture.png]
"""

from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib


matplotlib.use("Agg")
import matplotlib.cbook
import matplotlib.pyplot as plt
import numpy as np
import optax
from timing import Case, picture, report

import parallel_diffrax as pdx


jax.config.update("jax_enable_x64", True)

# Milliseconds between samples, and samples between the three delays and in a window.
SAMPLE, DELAY, WINDOW, WIDTH, BATCH = 0.5, 12, 60, 32, 32
CONTROLLER = dfx.PIDController(rtol=1e-3, atol=1e-4)
# Time runs in units of 10 ms.
TS = 0.1 * SAMPLE * jnp.arange(WINDOW + 1.0)


def recording() -> np.ndarray:
    """States of regular firing, one in a row."""
    path: Any = matplotlib.cbook.get_sample_data("membrane.dat", asfileobj=False)
    with open(path, "rb") as file:
        potential = np.frombuffer(file.read(), np.float32).astype(float)[4500:6900]
    weights = np.exp(-0.5 * (np.arange(-12, 13) / 4.0) ** 2)
    smooth = np.convolve(potential, weights / weights.sum(), mode="valid")
    smooth = (smooth - smooth.mean()) / smooth.std()
    return np.stack([smooth[2 * DELAY :], smooth[DELAY:-DELAY], smooth[: -2 * DELAY]], axis=1)


STATES = jnp.asarray(recording())


def field(t, y, weights):
    hidden = y
    for w, b in weights[:-1]:
        hidden = jnp.tanh(w @ hidden + b)
    w, b = weights[-1]
    return w @ hidden + b


def initial_weights(key):
    shapes = [(WIDTH, 3), (WIDTH, WIDTH), (3, WIDTH)]
    keys = jr.split(key, len(shapes))
    return [(jr.normal(k, s) / np.sqrt(s[1]), jnp.zeros(s[0])) for k, s in zip(keys, shapes)]


def trajectory(diffeqsolve, ts=TS, max_steps=96):
    """The states at `ts`, from the weights and the first state."""

    def solve(weights, y0):
        return diffeqsolve(
            dfx.ODETerm(field), dfx.Tsit5(), ts[0], ts[-1], 0.05, y0, weights, saveat=dfx.SaveAt(ts=ts),
            stepsize_controller=CONTROLLER, max_steps=max_steps,
        ).ys  # fmt: skip

    return solve


def loss(diffeqsolve):
    """The mean squared error over windows that begin at the given samples."""

    def error(weights, firsts):
        wanted = jax.vmap(lambda k: jax.lax.dynamic_slice_in_dim(STATES, k, WINDOW + 1))(firsts)
        found = jax.vmap(trajectory(diffeqsolve), in_axes=(None, 0))(weights, wanted[:, 0])
        return jnp.mean((found - wanted) ** 2)

    return error


WEIGHTS = initial_weights(jr.key(0))
FIRSTS = jr.randint(jr.key(1), (BATCH,), 0, len(STATES) - WINDOW)
CASES = {"loss and gradient": Case(lambda diffeqsolve: jax.value_and_grad(loss(diffeqsolve)), (WEIGHTS, FIRSTS), 1e-6)}


def train(steps: int = 1000):
    """The weights, and the losses."""
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps)))

    @jax.jit
    def step(weights, moments, key):
        firsts = jr.randint(key, (BATCH,), 0, len(STATES) - WINDOW)
        value, gradient = jax.value_and_grad(loss(pdx.diffeqsolve))(weights, firsts)
        updates, moments = optimiser.update(gradient, moments)
        return optax.apply_updates(weights, updates), moments, value

    weights, moments, losses = WEIGHTS, optimiser.init(WEIGHTS), []
    for key in jr.split(jr.key(2), steps):
        weights, moments, value = step(weights, moments, key)
        losses.append(float(value))
    return weights, np.array(losses)


def draw(path, weights, losses):
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=[1, 2.5], layout="constrained")
    left.semilogy(losses, lw=0.8)
    left.set(xlabel="step of training", ylabel="loss")
    count = 10 * WINDOW
    ts = 0.1 * SAMPLE * jnp.arange(count + 1.0)
    free = jax.jit(trajectory(pdx.diffeqsolve, ts, 4096))(weights, STATES[0])
    right.plot(10 * ts, STATES[: count + 1, 0], lw=3, alpha=0.4, label="recording, smoothed")
    right.plot(10 * ts, free[:, 0], lw=1, label="neural ODE, running freely")
    right.set(xlabel="ms", ylabel="potential, scaled")
    right.legend(loc="upper right")
    figure.savefig(path, dpi=110)


def main(path):
    print(f"On this {jax.default_backend().upper()}, windows of {WINDOW} samples, {BATCH} at a time:")
    report(CASES)
    weights, losses = train()
    print(f"Loss {losses[:20].mean():.3g} at first, {losses[-20:].mean():.3g} after {len(losses)} steps")
    draw(path, weights, losses)


if __name__ == "__main__":
    main(picture(__file__))
