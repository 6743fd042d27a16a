"""Solves all 16384 steps of FitzHugh-Nagumo over 400 time units at once, next to sequential Diffrax on the same grid.

Prints the statistics of the parallel solve, the difference between the two solves, their times, and the gradient of a loss.
Draws the trajectory, and the error of every iterate over time.

    python examples/quickstart.py [picture.png]
"""

import pathlib
import sys
import time

import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import parallel_diffrax as pdx


jax.config.update("jax_enable_x64", True)

T, NUM_STEPS = 400.0, 16384
Y0, ARGS = jnp.array([-1.0, 1.0]), jnp.array([0.5, 0.08])


def field(t, y, args):
    v, w = y
    current, rate = args
    return jnp.stack([v - v**3 / 3 - w + current, rate * (v + 0.7 - 0.8 * w)])


TERM = dfx.ODETerm(field)
TS = jnp.linspace(0.0, T, 2049)


# Solves in parallel on every device. On a CPU, steps in sequence are faster, and the default makes those.
IN_PARALLEL = pdx.ParallelSolver(dfx.Tsit5(), NUM_STEPS, policy=pdx.AdaptivePolicy())
BY_DEFAULT = pdx.ParallelSolver(dfx.Tsit5(), NUM_STEPS)


def parallel(y0, args, solver=IN_PARALLEL, **options):
    """The whole time span as one window, with `dt0` equal to its length."""
    return dfx.diffeqsolve(TERM, solver, 0.0, T, T, y0, args, max_steps=1, **options)


def by_default(y0, args):
    return parallel(y0, args, BY_DEFAULT)


def sequential(y0, args, **options):
    return dfx.diffeqsolve(TERM, dfx.Tsit5(), 0.0, T, T / NUM_STEPS, y0, args, max_steps=NUM_STEPS, **options)


def timed(fn, *args):
    """The result, and the times of the first call (mostly compilation) and of the second call."""

    def call():
        start = time.perf_counter()
        return jax.block_until_ready(fn(*args)), time.perf_counter() - start

    fn = jax.jit(fn)
    (_, first), (out, second) = call(), call()
    return out, first, second


def relative(a, b):
    return float(np.max(np.abs(a - b) / (1 + np.abs(b))))


def iterates(count):
    """The states after 1, ..., `count` iterations, from solves that stop there and leave the remaining steps unsolved."""
    trajectories = []
    for k in range(1, count + 1):
        solver = pdx.ParallelSolver(
            dfx.Tsit5(), NUM_STEPS, root_find_max_steps=k, policy=pdx.policies.ParallelOnly(), predictor=PREDICTOR
        )
        sol = parallel(Y0, ARGS, solver, saveat=dfx.SaveAt(ts=TS), throw=False)
        trajectories.append(np.asarray(sol.ys))
    return trajectories


# A poorer first guess than the default, so that the errors of the iterates are visible.
PREDICTOR = pdx.CoarsePredictor(num_steps=512, max_share=1 / 32)


def draw(path, exact, errors):
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    top.plot(TS, exact[:, 0], label="v", lw=1)
    top.plot(TS, exact[:, 1], label="w", lw=1)
    top.set_title(f"FitzHugh-Nagumo: {NUM_STEPS} Tsit5 steps solved at once")
    top.legend(loc="upper right")
    for k, error in enumerate(errors, start=1):
        bottom.semilogy(TS[1:], np.maximum(error[1:], 1e-17), label=f"{k}", lw=1, color=plt.cm.viridis(k / len(errors)))
    bottom.set(xlabel="time", ylabel="error of the iterate", ylim=(1e-17, 10))
    bottom.set_title("distance from the sequential trajectory, by iteration, from a guess of 512 coarse steps")
    bottom.legend(loc="lower right", title="iteration", ncols=3)
    figure.savefig(path, dpi=130)


def main(path):
    device = jax.devices()[0]
    saveat = dfx.SaveAt(ts=TS, solver_state=True)
    (exact, *_) = timed(lambda y0: sequential(y0, ARGS, saveat=dfx.SaveAt(ts=TS)).ys, Y0)
    sol, *_ = timed(lambda y0: parallel(y0, ARGS, saveat=saveat), Y0)
    statistics = pdx.statistics(sol)
    print(f"On {device.device_kind or device.platform}, float64, N = {NUM_STEPS}:")
    print(
        f"  Newton iterations {int(statistics.iterations)}, coarse steps of the guess {int(statistics.predictor_steps)},"
    )
    print(f"  sequential steps {int(statistics.sequential_steps)}, largest defect {float(statistics.residual):.1e}")
    print(f"  largest relative difference from sequential Diffrax: {relative(sol.ys, exact):.1e}")

    print("Times of the whole `diffeqsolve`, final state only (first call with compilation, second call):")
    for name, solve in (("in parallel", parallel), ("by default", by_default), ("Diffrax", sequential)):
        _, first, second = timed(lambda y0, solve=solve: solve(y0, ARGS).ys, Y0)
        print(f"  {name:11s} {first:7.2f} s  {1e3 * second:9.2f} ms")
    if device.platform == "cpu":
        print("  (On a CPU steps in sequence are faster, and the default: parallel-in-time is for GPUs.)")

    def loss(solve):
        return lambda args: jnp.sum(solve(Y0, args).ys ** 2)

    ours, *_ = timed(jax.grad(loss(parallel)), ARGS)
    theirs, *_ = timed(jax.grad(loss(sequential)), ARGS)
    print(f"Gradient of sum(y(T)^2) with respect to the arguments: {np.asarray(ours)}")
    print(
        f"  largest relative difference from sequential Diffrax: {float(np.max(np.abs((ours - theirs) / theirs))):.1e}"
    )

    errors = [np.max(np.abs(y - exact), axis=1) for y in iterates(4)]
    draw(path, exact, errors)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).with_suffix(".png"))
