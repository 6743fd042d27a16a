"""Training a neural ODE of 16 dimensions: a training step parallel in time with `WarmStart`, against the same training step
with plain Diffrax and its default adjoint.

    python -m benchmarks.neural_ode [--quick] [--steps 20] [--out FOLDER]

Both trainings have the same data, weights, minibatches, grid and number of training steps. By default they make 20 training
steps on minibatches of 32 of 64 trajectories, ten epochs. The row has the times and iterations of the training steps after
the first epoch, the compile time apart, and the largest relative difference of the loss curves. In the first epoch there
are no trajectories to start from.
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Iterator

import diffrax as dfx
import jax
import jax.numpy as jnp

import parallel_diffrax as pdx

from . import harness


T, NUM_SAVED, LEARNING_RATE = 10.0, 64, 1e-3


def field(t, y, weights):
    first, first_bias, last, last_bias = weights
    return last @ jnp.tanh(first @ y + first_bias) + last_bias - 0.5 * y


TERM = dfx.ODETerm(field)


def make_weights(key, size, width):
    keys = jax.random.split(key, 2)
    first = jax.random.normal(keys[0], (width, size)) / size**0.5
    last = 1.5 * jax.random.normal(keys[1], (size, width)) / width**0.5
    return first, jnp.zeros(width), last, jnp.zeros(size)


def saved_times():
    return jnp.linspace(0.0, T, NUM_SAVED)


def parallel(num_steps):
    """A function from weights, an initial state and the last solve's state to the saved states and this solve's state; and a
    function from an initial state to the state before the first solve."""
    # Convergence is quadratic: an update of 1e-4 leaves an error of about 1e-8.
    root_finder = pdx.ParallelNewton(rtol=1e-4, atol=1e-4)
    solver = pdx.ParallelSolver(
        dfx.Tsit5(), num_steps, root_finder=root_finder, predictor=pdx.WarmStart(), policy=pdx.AdaptivePolicy()
    )

    def solve(weights, y0, state):
        saveat = dfx.SaveAt(dense=True, solver_state=True)
        options = {"saveat": saveat, "adjoint": dfx.DirectAdjoint(), "max_steps": 1, "solver_state": state}
        sol = dfx.diffeqsolve(
            TERM, solver, 0.0, T, T / num_steps, y0, weights, stepsize_controller=pdx.Windows(), **options
        )
        return jax.vmap(pdx.refine(sol).evaluate)(saved_times()), sol.solver_state

    return solve, lambda y0: solver.init(TERM, 0.0, T, y0, None)


def sequential(num_steps):
    def solve(weights, y0, state):
        saveat = dfx.SaveAt(ts=saved_times())
        sol = dfx.diffeqsolve(TERM, dfx.Tsit5(), 0.0, T, T / num_steps, y0, weights, saveat=saveat, max_steps=num_steps)
        return sol.ys, state

    return solve, lambda y0: jnp.zeros(())


def adam(weights, gradient, moments, count):
    """One update by Adam (Kingma and Ba). It is written here so that the benchmark needs no further package."""
    m, v = moments
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, gradient)

    def update(w, m, v):
        return w - LEARNING_RATE * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8)

    return jax.tree.map(update, weights, m, v), (m, v)


def training_step(solve, y0s, targets):
    def step(carry, members):
        weights, moments, memory, count = carry

        def loss(weights):
            left = jax.tree.map(lambda x: x[members], memory)
            ys, left = jax.vmap(solve, in_axes=(None, 0, 0))(weights, y0s[members], left)
            return jnp.mean((ys - targets[members]) ** 2), left

        (value, left), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
        weights, moments = adam(weights, gradient, moments, count)
        memory = jax.tree.map(lambda x, new: x.at[members].set(new), memory, left)
        return (weights, moments, memory, count + 1), (value, left)

    return jax.jit(step)


def train(solve_and_start, weights, y0s, targets, minibatches):
    """Losses, times in seconds, compile time in seconds, and the solver states of each training step."""
    solve, start = solve_and_start
    zeros = jax.tree.map(jnp.zeros_like, weights)
    carry = (weights, (zeros, zeros), jax.jit(jax.vmap(start))(y0s), jnp.array(1.0))
    begin = time.perf_counter()
    step = training_step(solve, y0s, targets).lower(carry, minibatches[0]).compile()
    compile_s = time.perf_counter() - begin
    losses, times, left = [], [], []
    for members in minibatches:
        begin = time.perf_counter()
        carry, (value, states) = jax.block_until_ready(step(carry, members))
        times.append(time.perf_counter() - begin)
        losses.append(float(value))
        left.append(states)
    return losses, times, compile_s, left


def compare(num_steps, size, width, batch, num_steps_of_training) -> dict:
    """The row for one size."""
    num_data = 2 * batch
    per_epoch = num_data // batch
    keys = jax.random.split(jax.random.key(0), 3)
    y0s = jax.random.normal(keys[0], (num_data, size))
    teacher, weights = make_weights(keys[1], size, width), make_weights(keys[2], size, width)
    solve, _ = sequential(256)
    targets, _ = jax.jit(jax.vmap(solve, in_axes=(None, 0, None)))(teacher, y0s, None)

    epochs = -(-num_steps_of_training // per_epoch)
    orders = [jax.random.permutation(jax.random.key(1 + k), num_data).reshape(per_epoch, batch) for k in range(epochs)]
    minibatches = jnp.concatenate(orders)[:num_steps_of_training]
    losses, times, compile_s, left = train(parallel(num_steps), weights, y0s, targets, minibatches)
    theirs, slow, their_compile_s, _ = train(sequential(num_steps), weights, y0s, targets, minibatches)

    def mean(name, steps):
        return float(jnp.mean(jnp.stack([jnp.asarray(getattr(states.statistics, name), float) for states in steps])))

    ours_ms, theirs_ms = (1e3 * statistics.median(t[per_epoch:]) for t in (times, slow))
    return {
        "what": "training step",
        "N": num_steps,
        "D": size,
        "width": width,
        "batch": batch,
        "training_steps": num_steps_of_training,
        "parallel_ms": ours_ms,
        "diffrax_ms": theirs_ms,
        "speedup": theirs_ms / ours_ms,
        "parallel_first_epoch_ms": 1e3 * statistics.median(times[:per_epoch]),
        "compile_s": compile_s,
        "diffrax_compile_s": their_compile_s,
        "iterations_first_epoch": mean("iterations", left[:per_epoch]),
        "iterations": mean("iterations", left[per_epoch:]),
        "predictor_steps": mean("predictor_steps", left[per_epoch:]),
        "sequential_steps": mean("sequential_steps", left),
        "difference": max(abs(a - b) / abs(b) for a, b in zip(losses, theirs)),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "detail": {
            "losses": losses,
            "diffrax_losses": theirs,
            "parallel_step_ms": [1e3 * t for t in times],
            "diffrax_step_ms": [1e3 * t for t in slow],
        },
    }


def rows(quick: bool, training_steps: int = 20) -> Iterator[dict]:
    """Yields the rows of this part."""
    sizes = {"num_steps": 4096, "size": 16, "width": 64, "batch": 32}
    if quick:
        sizes = {"num_steps": 256, "size": 4, "width": 8, "batch": 4}
    yield compare(**sizes, num_steps_of_training=training_steps)


def main():
    parser = argparse.ArgumentParser(description="A training step of a neural ODE, parallel against sequential.")
    parser.add_argument("--quick", action="store_true", help="a small size, for a machine without a GPU")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder of the JSON file")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    (row,) = rows(options.quick, options.steps)
    path = harness.write(harness.result_name("neural_ode"), [row], options.out)
    print(jax.devices()[0].device_kind, path)
    columns = [name for name, value in row.items() if isinstance(value, (int, float)) and name != "training_steps"]
    print(harness.table([row], columns))


if __name__ == "__main__":
    main()
