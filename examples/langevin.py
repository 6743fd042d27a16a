"""Sampling by Langevin dynamics in the Müller-Brown potential, three wells with curved passes between them.

Many chains go one step after the other, with the default policy. Then a single long chain is solved in parallel over time, a
policy that is chosen by hand here: noise and friction make the chain forget where it was, so its exponent is negative, and a
few iterations solve thousands of steps (the theory page measures this). On a CPU that takes longer than one step after the
other; it is for GPUs.

Prints how long the chains take beside plain Diffrax, and the iterations of the long chain. Draws the potential with samples,
and their histogram beside the exact density.

    python examples/langevin.py [picture.png]
"""

import pathlib
import sys

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from timing import Case, report

import parallel_diffrax as pdx


jax.config.update("jax_enable_x64", True)

TEMPERATURE, DT, NUM_STEPS, CHAINS = 20.0, 2e-4, 1024, 128
T = NUM_STEPS * DT
DEPTHS = np.array([-200.0, -100.0, -170.0, 15.0])
CENTRES = np.array([[1.0, 0.0], [0.0, 0.5], [-0.5, 1.5], [-1.0, 1.0]])
SHAPES = np.array([[-1.0, 0.0, -10.0], [-1.0, 0.0, -10.0], [-6.5, 11.0, -6.5], [0.7, 0.6, 0.7]])


def potential(y):
    x = y - CENTRES
    exponents = SHAPES[:, 0] * x[:, 0] ** 2 + SHAPES[:, 1] * x[:, 0] * x[:, 1] + SHAPES[:, 2] * x[:, 1] ** 2
    return jnp.sum(DEPTHS * jnp.exp(exponents))


def terms(key, t1):
    """The force, and noise of the temperature."""
    path = dfx.VirtualBrownianTree(0.0, t1, tol=DT / 4, shape=(2,), key=key)
    noise = jnp.sqrt(2 * TEMPERATURE) * jnp.eye(2)
    force = dfx.ODETerm(lambda t, y, args: -jax.grad(potential)(y))
    return dfx.MultiTerm(force, dfx.ControlTerm(lambda t, y, args: noise, path))


def ends(diffeqsolve):
    """The last states of all chains."""

    def solve(y0, key):
        return diffeqsolve(terms(key, T), dfx.Euler(), 0.0, T, DT, y0, max_steps=NUM_STEPS).ys[0]

    return jax.vmap(solve)


# From both deep wells.
STARTS = jnp.asarray(np.resize([[-0.56, 1.44], [0.62, 0.03]], (CHAINS, 2)))
CASES = {f"{CHAINS} chains": Case(ends, (STARTS, jr.split(jr.key(0), CHAINS)))}


def long_chain(policy, num_steps=8192):
    """One chain, its states after every step."""
    solver = pdx.ParallelSolver(dfx.Euler(), num_steps, root_finder=pdx.ELK(), policy=policy)
    saveat = dfx.SaveAt(ts=DT * jnp.arange(1.0, num_steps + 1))
    t1 = num_steps * DT
    return jax.jit(
        lambda y0: pdx.diffeqsolve(
            terms(jr.key(1), t1), solver, 0.0, t1, DT, y0, saveat=saveat, max_steps=num_steps, throw=False
        )
    )(STARTS[0])


def draw(path, samples):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    xs, ys = np.linspace(-1.4, 1.2, 140), np.linspace(-0.4, 2.0, 140)
    grid = jnp.asarray(np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2))
    heights = np.asarray(jax.vmap(potential)(grid)).reshape(140, 140)
    left.contourf(xs, ys, heights, levels=np.linspace(-150, 100, 26), extend="max", cmap="viridis")
    left.plot(samples[:, 0], samples[:, 1], ".", color="white", ms=1.5, alpha=0.5)
    left.set(xlabel="x", ylabel="y", title="samples on the potential")
    density = np.exp(-heights / TEMPERATURE).sum(axis=0)
    density /= density.sum() * (xs[1] - xs[0])
    right.hist(samples[:, 0], bins=50, range=(-1.4, 1.2), density=True, alpha=0.5, label="samples")
    right.plot(xs, density, color="black", lw=1, label="exact")
    right.set(xlabel="x", title="density of x")
    right.legend()
    figure.savefig(path, dpi=110)


def main(path):
    print(f"On this {jax.default_backend().upper()}, {NUM_STEPS} steps of Euler-Maruyama:")
    report(CASES)
    together = long_chain(pdx.AdaptivePolicy())
    alone = long_chain(pdx.policies.Sequential())
    found = pdx.statistics(together)
    difference = float(np.max(np.abs(together.ys - alone.ys)))
    print(f"One chain of {len(together.ys)} steps in parallel, by hand: {int(found.iterations)} iterations in")
    print(
        f"  {int(found.attempts)} segments, {int(found.sequential_steps)} steps in sequence, difference {difference:.0e}"
    )
    draw(path, np.asarray(sample()))


def sample(rounds: int = 12):
    """States of all chains, one after each round but the first few."""
    solve = jax.jit(ends(pdx.diffeqsolve))
    y, samples = STARTS, []
    for k in range(rounds):
        y = solve(y, jr.split(jr.key(2 + k), CHAINS))
        samples.append(y)
    return jnp.concatenate(samples[2:])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).with_suffix(".png"))
