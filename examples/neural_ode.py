"""Trains a neural ODE on damped motion in a double well, parallel in time, next to the same training with plain Diffrax.

Every training step solves a minibatch of trajectories of thousands of steps, and differentiates a loss on saved states. The
first guess of each trajectory is the last trajectory of the same member of the data (`WarmStart`). After the first epoch,
about two Newton iterations solve it, without sequential steps.

Prints losses, iterations and times of both trainings, which have the same seeds and the same grid. Draws the loss curve and
the fit.

    python examples/neural_ode.py [--quick] [picture.png]

The default size, N = 4096 steps, is for a GPU. `--quick` is for a machine without a GPU: it takes about a minute, most of it
compilation. A CPU is faster with sequential steps.
"""

import argparse
import pathlib
import time
from dataclasses import dataclass

import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax

import parallel_diffrax as pdx


jax.config.update("jax_enable_x64", True)

T, NUM_SAVED, WIDTH = 10.0, 64, 32
TS = jnp.linspace(0.0, T, NUM_SAVED)


@dataclass(frozen=True)
class Size:
    """Numbers of fine steps, of trajectories in the data and in a minibatch, of epochs, and of epochs that plain Diffrax
    trains too."""

    num_steps: int
    num_data: int
    batch: int
    epochs: int
    compared_epochs: int


FULL = Size(num_steps=4096, num_data=64, batch=16, epochs=250, compared_epochs=5)
QUICK = Size(num_steps=256, num_data=16, batch=8, epochs=150, compared_epochs=40)


def double_well(t, y, args):
    x, v = y
    return jnp.stack([v, x - x**3 - 0.2 * v])


def network(t, y, weights):
    """A second-order equation whose acceleration is a network."""
    hidden = y
    for w, b in weights[:-1]:
        hidden = jnp.tanh(w @ hidden + b)
    w, b = weights[-1]
    return jnp.append(y[1], w @ hidden + b)


MOTION, MODEL = dfx.ODETerm(double_well), dfx.ODETerm(network)


def initial_weights(key):
    """Initial weights. The last layer is small, so that the acceleration is small at first."""
    shapes, scales = [(WIDTH, 2), (WIDTH, WIDTH), (1, WIDTH)], (1.0, 1.0, 0.1)
    keys = jax.random.split(key, len(shapes))
    return [
        (scale / np.sqrt(shape[1]) * jax.random.normal(key, shape), jnp.zeros(shape[0]))
        for key, shape, scale in zip(keys, shapes, scales)
    ]


def data(size: Size):
    """The initial states, and the states at the saved times."""
    keys = jax.random.split(jax.random.key(1), 3)
    side = jax.random.rademacher(keys[0], (size.num_data,))
    distance = jax.random.uniform(keys[1], (size.num_data,), minval=0.5, maxval=1.3)
    velocity = jax.random.uniform(keys[2], (size.num_data,), minval=-0.3, maxval=0.3)
    y0s = jnp.stack([side * distance, velocity], axis=1)

    def solve(y0):
        return dfx.diffeqsolve(MOTION, dfx.Tsit5(), 0.0, T, T / 1024, y0, saveat=dfx.SaveAt(ts=TS)).ys

    return y0s, jax.jit(jax.vmap(solve))(y0s)


def parallel(size: Size):
    """Two functions. The first maps weights, an initial state and the solver state of the member's last solve to the saved
    states and the new solver state. The second maps all initial states to the solver states before the first solve."""
    # Convergence is quadratic: an update of 1e-4 leaves an error of about 1e-8.
    solver = pdx.ParallelSolver(
        dfx.Tsit5(),
        size.num_steps,
        root_finder=pdx.ParallelNewton(rtol=1e-4, atol=1e-4),
        predictor=pdx.WarmStart(),
        policy=pdx.AdaptivePolicy(),
    )

    def solve(weights, y0, state):
        sol = dfx.diffeqsolve(
            MODEL,
            solver,
            0.0,
            T,
            T / size.num_steps,
            y0,
            weights,
            stepsize_controller=pdx.Windows(),
            saveat=dfx.SaveAt(dense=True, solver_state=True),
            adjoint=dfx.DirectAdjoint(),
            solver_state=state,
            max_steps=1,
        )
        return jax.vmap(pdx.refine(sol).evaluate)(TS), sol.solver_state

    return solve, jax.vmap(lambda y0: solver.init(MODEL, 0.0, T, y0, None))


def sequential(size: Size):
    """The same two functions by plain Diffrax, which needs no solver state."""

    def solve(weights, y0, state):
        sol = dfx.diffeqsolve(
            MODEL,
            dfx.Tsit5(),
            0.0,
            T,
            T / size.num_steps,
            y0,
            weights,
            saveat=dfx.SaveAt(ts=TS),
            max_steps=size.num_steps,
        )
        return sol.ys, state

    return solve, lambda y0s: jnp.zeros(y0s.shape[0])


def train(solve_and_start, size: Size, y0s, targets, epochs: int):
    """Trains for some epochs. Returns losses and times of the training steps, their mean iterations and steps of the first
    guess (parallel training only), and the final weights."""
    solve, start = solve_and_start
    schedule = optax.cosine_decay_schedule(1e-2, size.epochs * (size.num_data // size.batch), 0.01)
    optimiser = optax.chain(optax.clip_by_global_norm(0.3), optax.adam(schedule))

    @jax.jit
    def step(weights, moments, memory, members):
        def loss(weights):
            states = jax.tree.map(lambda x: x[members], memory)
            ys, states = jax.vmap(solve, in_axes=(None, 0, 0))(weights, y0s[members], states)
            return jnp.mean((ys - targets[members]) ** 2), states

        (value, states), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
        updates, moments = optimiser.update(gradient, moments)
        memory = jax.tree.map(lambda x, new: x.at[members].set(new), memory, states)
        return optax.apply_updates(weights, updates), moments, memory, value, states

    weights = initial_weights(jax.random.key(0))
    moments, memory = optimiser.init(weights), jax.jit(start)(y0s)
    losses, times, iterations = [], [], []
    for epoch in range(epochs):
        order = jax.random.permutation(jax.random.key(2 + epoch), size.num_data).reshape(-1, size.batch)
        for members in order:
            begin = time.perf_counter()
            weights, moments, memory, value, states = jax.block_until_ready(step(weights, moments, memory, members))
            times.append(time.perf_counter() - begin)
            losses.append(float(value))
            # The sequential solver leaves an array.
            if not isinstance(states, jax.Array):
                counted = (states.statistics.iterations, states.statistics.predictor_steps)
                iterations.append([float(jnp.mean(jnp.asarray(x))) for x in counted])
    return np.array(losses), np.array(times), np.array(iterations), weights


def draw(path, size: Size, losses, compared, iterations, y0s, weights):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    left.semilogy(losses, label="parallel in time", lw=1)
    left.semilogy(compared, "--", label="plain Diffrax", lw=1)
    left.set(xlabel="training step", ylabel="loss", title="the same loss curve")
    left.legend()
    middle.plot(iterations[:, 0], ".", ms=4, label="Newton iterations")
    middle.axvline(size.num_data // size.batch - 0.5, color="gray", lw=0.8, ls=":", label="end of the first epoch")
    middle.set(xlabel="training step", ylabel="iterations", ylim=(0, 1.5 * iterations[:, 0].max()))
    middle.set_title(f"work of a solve of {size.num_steps} steps (mean of batch)")
    guesses = middle.twinx()
    guesses.plot(iterations[:, 1], ".", ms=4, color="C1", label="steps in sequence for the first guess")
    guesses.set(ylabel="steps", ylim=(-1, None))
    handles = [handle for axes in (middle, guesses) for handle in axes.get_legend_handles_labels()[0]]
    middle.legend(handles=handles, loc="upper right")
    times = jnp.linspace(0.0, T, 400)
    for k in range(5):
        for term, args, style in ((MOTION, None, {"lw": 3, "alpha": 0.35}), (MODEL, weights, {"lw": 1})):
            saveat = dfx.SaveAt(ts=times)
            curve = np.asarray(dfx.diffeqsolve(term, dfx.Tsit5(), 0.0, T, T / 1024, y0s[k], args, saveat=saveat).ys)
            right.plot(curve[:, 0], curve[:, 1], color=f"C{k}", **style)
    right.set(xlabel="position", ylabel="velocity", title="data (broad) and fit (thin)")
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description="A neural ODE, trained parallel in time.")
    parser.add_argument("--quick", action="store_true", help="a smaller size, for a machine without a GPU")
    parser.add_argument("picture", nargs="?", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".png"))
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    y0s, targets = data(size)
    per_epoch = size.num_data // size.batch

    losses, times, iterations, weights = train(parallel(size), size, y0s, targets, size.epochs)
    compared, slow, *_ = train(sequential(size), size, y0s, targets, size.compared_epochs)
    difference = np.abs(losses[: len(compared)] - compared) / compared
    device = jax.devices()[0]
    print(f"On {device.device_kind or device.platform}, float64, N = {size.num_steps}, minibatches of {size.batch}:")
    print(f"  loss {losses[0]:.3g} in the first step, {losses[-per_epoch:].mean():.3g} in the last epoch")
    for name, counts in zip(("iterations", "sequential steps for the first guess"), iterations.T):
        print(f"  {name}, mean: {counts[:per_epoch].mean():.1f} in the first epoch, ", end="")
        print(f"{counts[per_epoch:].mean():.2f} after it")
    print(f"  largest relative difference of losses, {len(compared)} steps: {difference.max():.1e}", end="")
    print(f" ({difference[:20].max():.1e} in the first 20)")
    print("  times of a training step: median (and first, with compilation):")
    for name, t in (("parallel", times), ("plain Diffrax", slow)):
        print(f"    {name:14s} {1e3 * np.median(t[per_epoch:]):9.1f} ms  ({t[0]:.1f} s)")
    draw(options.picture, size, losses, compared, iterations, y0s, weights)
    print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
