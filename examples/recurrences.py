"""`pdx.parallel_scan` on three recurrences that are not ODEs: a gated network, a Langevin chain, and one with rejections.

Each is compared with `jax.lax.scan`; the script stops with a message if the two differ. Prints their largest difference and
the iterations of the root finders. Draws the states.

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

# Evaluates the linear recurrence of each iteration. On a CPU an associative scan gains nothing and compiles slowly.
SCAN = pdx.scans.SequentialScan() if jax.default_backend() == "cpu" else pdx.scans.AssociativeScan()


def check(what, ours, theirs, bound=1e-8):
    """Prints the largest difference between two pytrees, and stops if it is too large."""
    pairs = zip(jtu.tree_leaves(ours), jtu.tree_leaves(theirs), strict=True)
    difference = np.max([np.max(np.abs(np.asarray(a, float) - np.asarray(b, float))) for a, b in pairs])
    print(f"  {what}: largest difference from lax.scan {difference:.1e}")
    # The comparison is written so that NaN fails.
    if not difference <= bound:
        raise SystemExit(f"{what}: the difference from lax.scan is {difference:.1e}, more than {bound:.0e}.")


def count(what, f, init, xs, root_finder, max_steps=64):
    """Prints the number of iterations, which `optimistix.root_find` returns but `parallel_scan` does not."""

    def residual(y, xs):
        previous = jnp.concatenate([init[None], y[:-1]])
        return jax.vmap(lambda y, x: f(y, x)[0])(previous, xs) - y

    num_steps = len(jtu.tree_leaves(xs)[0])
    guess = jnp.broadcast_to(init, (num_steps, init.size))
    sol = optx.root_find(residual, root_finder, guess, xs, max_steps=max_steps, throw=False)
    solved = num_steps if bool(sol.result == optx.RESULTS.successful) else int(sol.stats["num_converged"])
    print(f"  {what}: {sol.stats['num_steps']} iterations, which leave {num_steps - solved} steps to the policy")


def gru(num_steps=4000, size=16):
    """A gated recurrent unit with small weights, so that it forgets its past."""
    print(f"Gated recurrent unit, {num_steps} steps of {size} numbers:")
    key, *keys = jr.split(jr.key(0), 4)
    weights = [0.5 * jr.normal(k, (size, size)) / np.sqrt(size) for k in keys]
    init, xs = jnp.zeros(size), jr.normal(key, (num_steps, size))

    def step(h, x, weights=weights):
        update, reset, candidate = weights
        z, r = jax.nn.sigmoid(update @ h + x), jax.nn.sigmoid(reset @ h + x)
        h = (1 - z) * h + z * jnp.tanh(candidate @ (r * h) + x)
        return h, h

    exact = jax.lax.scan(step, init, xs)
    count("Newton", step, init, xs, pdx.ParallelNewton(scan=SCAN))
    check("Newton, states", pdx.parallel_scan(step, init, xs), exact)

    # Quasi-Newton makes more iterations, each at less cost. Derivatives still use exact Jacobians.
    quasi = pdx.ParallelNewton(jacobian=pdx.jacobians.Diagonal(), scan=SCAN)

    def gradient(scan):
        def loss(weights):
            out = scan(lambda h, x: step(h, x, weights), init, xs)
            return jnp.mean(out[1] ** 2), out

        return jax.jit(jax.grad(loss, has_aux=True))(weights)

    ours, states = gradient(lambda f, init, xs: pdx.parallel_scan(f, init, xs, root_finder=quasi))
    count("Quasi-Newton, Diagonal", step, init, xs, quasi)
    check("Quasi-Newton, Diagonal, states", states, exact)
    check("Quasi-Newton, Diagonal, gradient with respect to the weights", ours, gradient(jax.lax.scan)[0])
    return np.asarray(exact[1])


def potential(q):
    """The potential, with wells at -1 and 1 in every component."""
    return jnp.sum((q**2 - 1) ** 2) / 4


def langevin(num_steps=10_000, size=2, dt=0.01):
    """An unadjusted Langevin chain. Its noise is drawn beforehand, so that the chain is a recurrence. The guess is the
    initial state at every step."""
    print(f"Langevin chain, {num_steps} steps of {size} numbers:")

    def step(q, noise):
        q = q - dt * jax.grad(potential)(q) + jnp.sqrt(2 * dt) * noise
        return q, q

    init, xs = jnp.ones(size), jr.normal(jr.key(1), (num_steps, size))
    exact = jax.lax.scan(step, init, xs)
    elk = pdx.ELK(scan=SCAN)
    count("ELK", step, init, xs, elk, max_steps=100)
    check("ELK", pdx.parallel_scan(step, init, xs, root_finder=elk, max_steps=100), exact)
    return np.asarray(exact[1])


def adjusted_langevin(num_steps=2000, size=2, dt=0.1):
    """A Langevin chain with larger steps, each a proposal that is accepted or rejected. The uniform numbers that decide are
    also drawn beforehand.

    The step is discontinuous where acceptance turns into rejection, and its Jacobian does not show this. So iterations go
    on until every decision is right. The number of Newton iterations depends on rounding here. With `dt = 0.2` Newton's
    method gives up; ELK and Jacobi do not.
    """
    print(f"Metropolis-adjusted Langevin chain, {num_steps} steps of {size} numbers:")

    def log_proposal(to, start):
        return -jnp.sum((to - start + dt * jax.grad(potential)(start)) ** 2) / (4 * dt)

    def step(q, x):
        noise, uniform = x
        new = q - dt * jax.grad(potential)(q) + jnp.sqrt(2 * dt) * noise
        log_ratio = potential(q) - potential(new) + log_proposal(q, new) - log_proposal(new, q)
        accepted = jnp.log(uniform) < log_ratio
        q = jnp.where(accepted, new, q)
        return q, (q, accepted)

    keys = jr.split(jr.key(0))
    init, xs = jnp.ones(size), (jr.normal(keys[0], (num_steps, size)), jr.uniform(keys[1], (num_steps,)))
    exact = jax.lax.scan(step, init, xs)
    # The decision alone couples the components, so the Jacobian is diagonal, and `Diagonal()` is exact.
    best = pdx.ELK(jacobian=pdx.jacobians.Diagonal(), scan=SCAN)
    count("Newton", step, init, xs, pdx.ParallelNewton(scan=SCAN), max_steps=400)
    count("Jacobi", step, init, xs, pdx.ParallelNewton(jacobian=pdx.jacobians.Zero()), max_steps=400)
    count("ELK, Diagonal", step, init, xs, best, max_steps=400)
    check("ELK, Diagonal", pdx.parallel_scan(step, init, xs, root_finder=best, max_steps=400), exact)
    states, accepted = (np.asarray(x) for x in exact[1])
    print(f"  {np.mean(accepted):.0%} of the proposals are accepted")
    return states, accepted


def draw(path, hidden, free, states, accepted):
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 8), layout="constrained")
    top.plot(hidden[:200, :4], lw=1)
    top.set_title(f"Gated recurrent unit: 4 of {hidden.shape[1]} components, the first 200 of {len(hidden)} steps")
    middle.plot(free, lw=0.7)
    middle.set_title(f"Langevin chain in two wells: {len(free)} steps of 0.01")
    bottom.plot(states, lw=0.7)
    rejected = np.flatnonzero(~accepted)
    bottom.plot(rejected, states[rejected, 0], "k.", ms=3, label="rejected")
    bottom.set_title(f"Metropolis-adjusted Langevin chain: {len(states)} steps of 0.1")
    bottom.set_xlabel("step")
    bottom.legend(loc="upper right")
    figure.savefig(path, dpi=130)


def main(path):
    start = time.perf_counter()
    draw(path, gru(), langevin(), *adjusted_langevin())
    print(f"Picture: {path}; {time.perf_counter() - start:.0f} s in total, almost all of it compilation")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).with_suffix(".png"))
