"""A double pendulum: how its largest Lyapunov exponent grows with the angle at which it is released, and what that means for
a solve in parallel over time.

Prints the exponents, how long a solve takes beside plain Diffrax with only the import changed (the default policy), and what
`AdaptivePolicy`, chosen by hand, does with the same steps. On a CPU that is slower than steps in sequence. Draws the
exponents, and one solve by `pdx.diagnostics.plot`.

    python examples/double_pendulum.py [picture.png]
"""

from typing import Any

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

T, NUM_STEPS = 40.0, 4096
ANGLES = jnp.linspace(0.2, 3.0, 29)


def field(t, y, args):
    """Two unit masses on unit rods: the angles from the vertical, and their rates."""
    a, b, u, v = y
    d, g = a - b, 9.81
    scale = 2 - jnp.cos(d) ** 2
    du = (-g * (2 * jnp.sin(a) - jnp.cos(d) * jnp.sin(b)) - jnp.sin(d) * (v**2 + u**2 * jnp.cos(d))) / scale
    dv = (2 * g * (jnp.cos(d) * jnp.sin(a) - jnp.sin(b)) + jnp.sin(d) * (2 * u**2 + v**2 * jnp.cos(d))) / scale
    return jnp.stack([u, v, du, dv])


TERM = dfx.ODETerm(field)


def released(angle):
    """At rest, both rods at the same angle."""
    return jnp.array([1.0, 1.0, 0.0, 0.0]) * angle


def exponent(angle):
    """The largest exponent over ten times the time, from steps that are made in sequence."""
    return pdx.lyapunov_exponent(
        TERM, dfx.Tsit5(), 0.0, 10 * T, released(angle), num_steps=4 * NUM_STEPS, policy=pdx.policies.Sequential()
    ).exponent


def solve(diffeqsolve, solver: dfx.AbstractSolver = dfx.Tsit5(), saveat=dfx.SaveAt(ts=jnp.linspace(0.0, 10.0, 101))):
    """A function from the angle to the solution. The saved times end before rounding has grown to size one."""
    dt0 = T / NUM_STEPS
    return lambda angle: diffeqsolve(TERM, solver, 0.0, T, dt0, released(angle), saveat=saveat, max_steps=NUM_STEPS)


CASES = {f"{NUM_STEPS} steps of Tsit5": Case(lambda diffeqsolve: lambda a: solve(diffeqsolve)(a).ys, (2.0,), 1e-6)}
IN_PARALLEL = pdx.ParallelSolver(dfx.Tsit5(), NUM_STEPS, policy=pdx.AdaptivePolicy())


def draw(path, exponents, sol):
    figure = plt.figure(figsize=(13, 6.5), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=[1, 1.5])
    left, right = parts
    axes = left.subplots()
    axes.plot(ANGLES, exponents, "o-", ms=4, lw=1)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="angle of release", ylabel="largest Lyapunov exponent, 1 / s")
    pdx.diagnostics.plot(sol, components=[0, 1], figure=right)
    figure.savefig(path, dpi=100)


def main(path):
    print(f"On this {jax.default_backend().upper()}:")
    report(CASES)
    exponents = np.asarray(jax.jit(lambda angles: jax.lax.map(exponent, angles))(ANGLES))
    print("Exponents: " + ", ".join(f"{x:.2f} at {a:.1f}" for a, x in zip(ANGLES[::4], exponents[::4])))
    in_parallel = jax.jit(solve(pdx.diffeqsolve, IN_PARALLEL, dfx.SaveAt(t1=True, dense=True)))
    for angle in (0.5, 2.0):
        found = pdx.statistics(in_parallel(angle))
        print(
            f"In parallel, released at {angle}: {int(found.iterations)} iterations in {int(found.attempts)} segments, "
            f"{int(found.sequential_steps)} steps in sequence"
        )
    draw(path, exponents, in_parallel(2.0))


if __name__ == "__main__":
    main(picture(__file__))
