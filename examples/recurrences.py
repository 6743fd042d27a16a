"""`pdx.parallel_scan` on three recurrences that are not ODEs: a gated network, a Langevin chain, and one that may reject.

Each is compared with `jax.lax.scan`; the script stops with a sentence where the two differ. Prints how far they are apart
and how many iterations the root finders took; draws the states.

    python examples/recurrences.py [picture.png]
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx

import parallel_diffrax as pdx


jax.config.update("jax_enable_x64", True)

LARGEST_DIFFERENCE = 1e-8


def check(what, ours, theirs):
    """Prints the largest difference between two pytrees, and stops if it is too large."""
    pairs = zip(jtu.tree_leaves(ours), jtu.tree_leaves(theirs), strict=True)
    difference = max(float(np.max(np.abs(np.asarray(a, float) - np.asarray(b, float)))) for a, b in pairs)
    print(f"  {what}: largest difference from lax.scan {difference:.1e}")
    # Written so that NaN fails.
    if not difference <= LARGEST_DIFFERENCE:
        raise SystemExit(f"{what}: {difference:.1e} is more than {LARGEST_DIFFERENCE:.0e} away from lax.scan.")


def count(name, f, init, xs, root_finder, max_steps=64):
    """Prints the number of iterations. `parallel_scan` does not return it, `optimistix.root_find` does."""

    def residual(y, xs):
        previous = jnp.concatenate([init[None], y[:-1]])
        return jax.vmap(lambda y, x: f(y, x)[0])(previous, xs) - y

    num_steps = jtu.tree_leaves(xs)[0].shape[0]
    guess = jnp.broadcast_to(init, (num_steps, *init.shape))
    sol = optx.root_find(residual, root_finder, guess, xs, max_steps=max_steps, throw=False)
    iterations, solved = int(sol.stats["num_steps"]), int(sol.stats["converged_steps"])
    if bool(sol.result == optx.RESULTS.successful):
        print(f"  {name}: all {num_steps} steps in {iterations} iterations")
    else:
        print(f"  {name}: {solved} of {num_steps} steps in {iterations} iterations, the rest is left to the fallback")


# A gated recurrent unit.

GRU_STEPS, GRU_SIZE = 4000, 16


def gru_step(weights, h, x):
    update = jax.nn.sigmoid(weights["update"] @ h + x)
    reset = jax.nn.sigmoid(weights["reset"] @ h + x)
    h = (1 - update) * h + update * jnp.tanh(weights["candidate"] @ (reset * h) + x)
    return h, h


def gru():
    print(f"Gated recurrent unit, {GRU_STEPS} steps of {GRU_SIZE} numbers:")
    *keys, key = jr.split(jr.key(0), 4)
    # Small enough that the network forgets its past.
    weights = {
        name: 0.5 * jr.normal(k, (GRU_SIZE, GRU_SIZE)) / np.sqrt(GRU_SIZE)
        for name, k in zip(("update", "reset", "candidate"), keys)
    }
    xs = jr.normal(key, (GRU_STEPS, GRU_SIZE))
    init = jnp.zeros(GRU_SIZE)
    quasi = pdx.ParallelNewton(jacobian=pdx.Diagonal())

    def step(h, x):
        return gru_step(weights, h, x)

    exact = jax.lax.scan(step, init, xs)
    for name, root_finder in (("Newton", pdx.ParallelNewton()), ("quasi-Newton, Diagonal", quasi)):
        count(name, step, init, xs, root_finder)
        check(name, pdx.parallel_scan(step, init, xs, root_finder=root_finder), exact)

    def loss(scan):
        return lambda weights: jnp.mean(scan(lambda h, x: gru_step(weights, h, x), init, xs)[1] ** 2)

    # The approximation is for the iterations only: derivatives use exact Jacobians.
    ours = jax.jit(jax.grad(loss(lambda f, init, xs: pdx.parallel_scan(f, init, xs, root_finder=quasi))))(weights)
    check("gradient for the weights, Diagonal", ours, jax.jit(jax.grad(loss(jax.lax.scan)))(weights))
    return np.asarray(exact[1])


# Langevin chains. What is random is drawn beforehand, so that a chain is a recurrence.


def potential(q):
    """Wells at -1 and 1 in every component."""
    return jnp.sum((q**2 - 1) ** 2) / 4


def langevin():
    num_steps, size, dt = 10_000, 2, 0.01
    print(f"Unadjusted Langevin chain in two wells, {num_steps} steps of {size} numbers:")

    def step(q, noise):
        q = q - dt * jax.grad(potential)(q) + jnp.sqrt(2 * dt) * noise
        return q, q

    # The guess is the initial state at every step. From one this poor, Newton's method needs damping.
    init, xs = jnp.ones(size), jr.normal(jr.key(1), (num_steps, size))
    exact = jax.lax.scan(step, init, xs)
    count("ELK", step, init, xs, pdx.ELK(), max_steps=100)
    check("ELK", pdx.parallel_scan(step, init, xs, root_finder=pdx.ELK(), max_steps=100), exact)
    return np.asarray(exact[1])


def adjusted_langevin():
    num_steps, size, dt = 2000, 2, 0.1
    print(f"Metropolis-adjusted Langevin chain in two wells, {num_steps} steps of {size} numbers:")

    def log_proposal(to, start):
        return -jnp.sum((to - start + dt * jax.grad(potential)(start)) ** 2) / (4 * dt)

    def step(q, x):
        noise, uniform = x
        proposal = q - dt * jax.grad(potential)(q) + jnp.sqrt(2 * dt) * noise
        log_ratio = potential(q) - potential(proposal) + log_proposal(q, proposal) - log_proposal(proposal, q)
        accepted = jnp.log(uniform) < log_ratio
        q = jnp.where(accepted, proposal, q)
        return q, (q, accepted)

    key_noise, key_uniform = jr.split(jr.key(0))
    init, xs = jnp.ones(size), (jr.normal(key_noise, (num_steps, size)), jr.uniform(key_uniform, (num_steps,)))
    exact = jax.lax.scan(step, init, xs)

    # A step jumps where acceptance turns into rejection, of which its Jacobian knows nothing: iterations are spent until
    # every decision is the right one. Components meet in the decision alone, so that the Jacobian is diagonal.
    best = pdx.ELK(jacobian=pdx.Diagonal())
    count("Newton", step, init, xs, pdx.ParallelNewton(), max_steps=400)
    count("Jacobi, Zero", step, init, xs, pdx.ParallelNewton(jacobian=pdx.Zero()), max_steps=400)
    count("ELK", step, init, xs, pdx.ELK(), max_steps=400)
    count("ELK, Diagonal", step, init, xs, best, max_steps=400)
    # Steps that are not solved by then are made in sequence, by the default `SequentialFallback`.
    check("ELK, Diagonal", pdx.parallel_scan(step, init, xs, root_finder=best, max_steps=400), exact)
    states, accepted = (np.asarray(x) for x in exact[1])
    print(f"  {np.mean(accepted):.0%} of the proposals were accepted, every decision as in lax.scan")
    return states, accepted


def draw(path, hidden, free, states, accepted):
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 8), layout="constrained")
    top.plot(hidden[:200, :4], lw=1)
    top.set_title(f"Gated recurrent unit: four of {GRU_SIZE} components, the first 200 of {GRU_STEPS} steps")
    for panel, chain in ((middle, free), (bottom, states)):
        panel.plot(chain, lw=0.7)
        panel.set_ylabel("position")
    middle.set_title(f"Unadjusted Langevin chain in two wells: {len(free)} steps")
    rejected = np.flatnonzero(~accepted)
    bottom.plot(rejected, states[rejected, 0], "k.", ms=3, label="rejected")
    bottom.set_title(f"Metropolis-adjusted Langevin chain: {len(states)} larger steps")
    bottom.set_xlabel("step")
    bottom.legend(loc="upper right")
    figure.savefig(path, dpi=130)


def main(path):
    start = time.perf_counter()
    draw(path, gru(), langevin(), *adjusted_langevin())
    print(f"Picture: {path}; {time.perf_counter() - start:.0f} s in all, nearly all of it compilation")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).with_suffix(".png"))
