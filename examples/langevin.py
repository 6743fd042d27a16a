"""Langevin sampling of a posterior: how the deaths of animals depend on the dose of a poison (Racine and others, 1986).

Twenty animals, four doses, a logistic model with two parameters: the usual first example of Bayesian statistics. Many chains
go one step after the other, with the default policy. Then a single long chain is solved in parallel over time, which is
chosen by hand here: a chain in a valley forgets where it was, so its exponent is negative, and a few iterations solve
thousands of steps. On a CPU that takes longer than one step after the other; it is for GPUs.

Prints how long the chains take beside plain Diffrax, and the iterations of the long chain. Draws the posterior with samples,
and the density of one parameter beside the exact one.

    python examples/langevin.py [picture.png]
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from timing import Case, picture, report

import parallel_diffrax as pdx


jax.config.update("jax_enable_x64", True)

DT, NUM_STEPS, CHAINS = 0.01, 1024, 128
T = NUM_STEPS * DT
DOSES, ANIMALS, DEATHS = np.array([-0.86, -0.3, -0.05, 0.73]), np.full(4, 5.0), np.array([0.0, 1.0, 3.0, 5.0])
# The parameters are measured in these units, so that the posterior is about as wide in both.
UNITS = np.array([1.0, 5.0])


def potential(y):
    """Minus the logarithm of the posterior. The priors are normal, with standard deviations of 2 and 10."""
    intercept, slope = y * UNITS
    logits = intercept + slope * DOSES
    prior = (intercept / 2) ** 2 / 2 + (slope / 10) ** 2 / 2
    return prior + jnp.sum(ANIMALS * jax.nn.softplus(logits) - DEATHS * logits)


def terms(key, t1):
    """The force, and noise."""
    path = dfx.VirtualBrownianTree(0.0, t1, tol=DT / 4, shape=(2,), key=key)
    noise = jnp.sqrt(2.0) * jnp.eye(2)
    force = dfx.ODETerm(lambda t, y, args: -jax.grad(potential)(y))
    return dfx.MultiTerm(force, dfx.ControlTerm(lambda t, y, args: noise, path))


def ends(diffeqsolve):
    """The last states of all chains."""

    def solve(y0, key):
        return diffeqsolve(terms(key, T), dfx.Euler(), 0.0, T, DT, y0, max_steps=NUM_STEPS).ys[0]

    return jax.vmap(solve)


STARTS = jnp.tile(jnp.array([1.0, 2.0]), (CHAINS, 1))
CASES = {f"{CHAINS} chains": Case(ends, (STARTS, jr.split(jr.key(0), CHAINS)))}


def long_chain(policy, num_steps=8192):
    """One chain, its states after every step."""
    solver = pdx.ParallelSolver(dfx.Euler(), num_steps, policy=policy)
    saveat = dfx.SaveAt(ts=DT * jnp.arange(1.0, num_steps + 1))
    t1 = num_steps * DT
    return jax.jit(
        lambda y0: pdx.diffeqsolve(
            terms(jr.key(1), t1), solver, 0.0, t1, DT, y0, saveat=saveat, max_steps=num_steps, throw=False
        )
    )(STARTS[0])


def draw(path, samples):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    xs, ys = np.linspace(-2.5, 5.0, 140), np.linspace(-1.0, 8.0, 140)
    grid = jnp.asarray(np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2))
    density = np.exp(-np.asarray(jax.vmap(potential)(grid))).reshape(140, 140)
    left.contour(xs, UNITS[1] * ys, density, levels=8, cmap="viridis")
    left.plot(samples[:, 0], UNITS[1] * samples[:, 1], ".", color="black", ms=1.5, alpha=0.4)
    left.set(xlabel="intercept", ylabel="slope", title="posterior (lines) and samples")
    exact = density.sum(axis=0)
    exact /= exact.sum() * (xs[1] - xs[0])
    right.hist(samples[:, 0], bins=50, range=(-2.5, 5.0), density=True, alpha=0.5, label="samples")
    right.plot(xs, exact, color="black", lw=1, label="exact")
    right.set(xlabel="intercept", title="density")
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
    main(picture(__file__))
