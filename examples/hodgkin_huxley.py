"""A Hodgkin-Huxley neuron under a noisy current: its conductances, fitted by gradient to a recording of the voltage.

The current is a step with coloured noise, as in experiments, sampled every 0.05 ms. The "recording" is a simulation with
noise. The fit sees the voltage every 0.5 ms and starts with conductances that are 10 to 20 percent wrong.

Prints the fit, and how long a solve and a gradient take beside plain Diffrax, with only the import changed. Draws the
current, the recording and the fit.

    python examples/hodgkin_huxley.py [picture.png]
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from timing import Case, descend, picture, report

import parallel_diffrax as pdx


jax.config.update("jax_enable_x64", True)

# Times in ms, voltages in mV, currents in uA / cm^2, conductances in mS / cm^2.
T, DT, SAMPLE = 50.0, 0.025, 0.05
TS = jnp.arange(0.5, T + 0.25, 0.5)
TRUE = jnp.array([120.0, 36.0, 0.3])
NAMES = ("sodium", "potassium", "leak")


def stimulus() -> jax.Array:
    """A step of 9 with noise that forgets within 2 ms."""
    noise, rng = [0.0], np.random.default_rng(0)
    keep = np.exp(-SAMPLE / 2.0)
    for _ in range(round(T / SAMPLE) + 1):
        noise.append(keep * noise[-1] + 3.0 * np.sqrt(1 - keep**2) * rng.normal())
    current = 9.0 + np.array(noise)
    current[: round(5 / SAMPLE)] = 0.0
    return jnp.asarray(current)


CURRENT = stimulus()


def rate(v, a, b, c):
    """`a (v - b) / (1 - exp(-(v - b) / c))`, also where both vanish."""
    x = (v - b) / c
    near = jnp.abs(x) < 1e-6
    return a * c * jnp.where(near, 1 + x / 2, x / (1 - jnp.exp(-jnp.where(near, 1.0, x))))


def field(t, y, conductances):
    v, m, h, n = y
    sodium, potassium, leak = conductances
    # The current between two samples is on a line.
    place = jnp.clip(t / SAMPLE, 0, CURRENT.size - 2)
    index = place.astype(int)
    current = CURRENT[index] + (place - index) * (CURRENT[index + 1] - CURRENT[index])
    dv = current - sodium * m**3 * h * (v - 50) - potassium * n**4 * (v + 77) - leak * (v + 54.387)
    dm = rate(v, 0.1, -40, 10) * (1 - m) - 4 * jnp.exp(-(v + 65) / 18) * m
    dh = 0.07 * jnp.exp(-(v + 65) / 20) * (1 - h) - h / (1 + jnp.exp(-(v + 35) / 10))
    dn = rate(v, 0.01, -55, 10) * (1 - n) - 0.125 * jnp.exp(-(v + 65) / 80) * n
    return jnp.stack([dv, dm, dh, dn])


# Rest.
Y0 = jnp.array([-65.0, 0.053, 0.596, 0.318])


def voltage(diffeqsolve, ts=TS):
    """The voltage at `ts`, from the conductances."""

    def solve(conductances):
        saveat = dfx.SaveAt(ts=ts)
        return diffeqsolve(dfx.ODETerm(field), dfx.Tsit5(), 0.0, T, DT, Y0, conductances, saveat=saveat).ys[:, 0]

    return solve


RECORDED = voltage(pdx.diffeqsolve)(TRUE) + np.random.default_rng(1).normal(size=TS.size)
START = jnp.log(TRUE * jnp.array([0.9, 1.1, 1.2]))


def loss(diffeqsolve):
    """The mean squared error of the voltage, from the logarithms of the conductances."""
    return lambda logs: jnp.mean((voltage(diffeqsolve)(jnp.exp(logs)) - RECORDED) ** 2)


CASES = {
    "solve": Case(voltage, (TRUE,)),
    "loss and gradient": Case(lambda diffeqsolve: jax.value_and_grad(loss(diffeqsolve)), (START,), 1e-6),
}


def fit(steps: int = 150):
    """The logarithms of the conductances that the optimiser finds, and the losses."""
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(0.02, steps)))
    return descend(loss(pdx.diffeqsolve), START, optimiser, steps)


def draw(path, fitted):
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=[1, 2.5], layout="constrained"
    )
    above.plot(SAMPLE * np.arange(CURRENT.size), CURRENT, lw=0.8, color="black")
    above.set(ylabel="current, uA / cm²")
    below.plot(TS, RECORDED, ".", color="black", ms=4, label="recording")
    ts = jnp.linspace(0.0, T, 501)
    curve = jax.jit(voltage(pdx.diffeqsolve, ts))
    for name, conductances in (("start", jnp.exp(START)), ("fit", jnp.exp(fitted))):
        below.plot(ts, curve(conductances), lw=1.2, label=name)
    below.set(xlabel="time, ms", ylabel="voltage, mV", xlim=(0, T))
    below.legend()
    figure.savefig(path, dpi=110)


def main(path):
    print(f"On this {jax.default_backend().upper()}, {round(T / DT)} steps of Tsit5:")
    report(CASES)
    fitted, losses = fit()
    print(f"Mean squared error {losses[0]:.3g} at first, {losses[-1]:.3g} after {len(losses)} steps (noise: 1)")
    for name, start, found, true in zip(NAMES, jnp.exp(START), jnp.exp(fitted), TRUE):
        print(f"  {name}: {start:.3g} at first, {found:.4g} fitted, {true:.4g} true")
    draw(path, fitted)


if __name__ == "__main__":
    main(picture(__file__))
