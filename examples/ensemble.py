"""The Lorenz system for every strength of the heating: a million trajectories on a GPU, four thousand on a CPU.

Each member of the batch has its own parameter and takes its own adaptive steps. On a GPU the whole adaptive solve is one
kernel with a thread for each member; on a CPU it is one loop. No setting asks for either.

Prints how long the ensemble takes beside plain Diffrax, with only the import changed. Draws the attractor against the
parameter: fixed points, their loss of stability, chaos, and windows of order within.

    python examples/ensemble.py [picture.png]
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from timing import Case, picture, report

import parallel_diffrax as pdx


jax.config.update("jax_enable_x64", True)

MEMBERS = 2**20 if jax.default_backend() == "gpu" else 2**12
HEATING = jnp.linspace(0.5, 170.0, MEMBERS)
CONTROLLER = dfx.PIDController(rtol=1e-6, atol=1e-8)


def field(t, y, heating):
    return jnp.stack([10 * (y[1] - y[0]), y[0] * (heating - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])


def end_state(diffeqsolve, t1=5.0, saveat=dfx.SaveAt(t1=True)):
    """The saved states of all members."""

    def solve(heating, y0):
        return diffeqsolve(
            dfx.ODETerm(field), dfx.Tsit5(), 0.0, t1, 0.01, y0, heating, saveat=saveat, stepsize_controller=CONTROLLER,
            max_steps=4096,
        ).ys  # fmt: skip

    return jax.vmap(solve)


STARTS = jnp.stack([jnp.ones(MEMBERS), jnp.ones(MEMBERS), HEATING], axis=1)
# In chaos, rounding grows like the solution's other errors.
CASES = {"end states of all members, T = 5": Case(end_state, (HEATING, STARTS), 1e-5)}


def draw(path, heating, ends):
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    axes.plot(np.repeat(heating, ends.shape[1]), ends.reshape(-1), ",", color="black", alpha=0.5)
    axes.set(xlabel="strength of the heating, r", ylabel="z at twenty times", title="where the Lorenz system ends")
    axes.set(xlim=(heating[0], heating[-1]))
    figure.savefig(path, dpi=110)


def main(path):
    print(f"On this {jax.default_backend().upper()}, {MEMBERS} members, Tsit5 with a PIDController at 1e-6:")
    report(CASES)
    # The picture needs no more than a thousand members, after a time in which they reach the attractor.
    chosen = slice(None, None, max(1, MEMBERS // 1024))
    times = dfx.SaveAt(ts=jnp.linspace(10.0, 15.0, 20))
    ends = jax.jit(end_state(pdx.diffeqsolve, 15.0, times))(HEATING[chosen], STARTS[chosen])
    draw(path, np.asarray(HEATING[chosen]), np.asarray(ends[:, :, 2]))


if __name__ == "__main__":
    main(picture(__file__))
