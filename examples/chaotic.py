"""Chaotic systems, each solved in one call: how fast perturbations grow, how `AdaptivePolicy` cuts the time span into
segments, and how the time compares with sequential Diffrax.

    python examples/chaotic.py [--out FOLDER] [--stiff]

Writes `chaotic.png`: a component of each solution, the growth of perturbations, and the difference from sequential Diffrax.
Parallel-in-time is meant for GPUs; on a CPU it is slower than stepping. The stiff system, an implicit method with 64
unknowns, takes a long time on a CPU, so a CPU skips it unless `--stiff` is given.
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx

import parallel_diffrax as pdx


@dataclass(frozen=True)
class System:
    """A vector field, a solver, an initial state, a time span from zero to `t1` in `num_steps` steps, and the component to
    draw with its label."""

    field: Callable
    solver: dfx.AbstractSolver
    y0: np.ndarray
    t1: float
    num_steps: int
    component: int
    label: str


def lorenz63(t, y, args):
    return jnp.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])


def lorenz96(t, y, args):
    return (jnp.roll(y, -1) - jnp.roll(y, 2)) * jnp.roll(y, 1) - y + 8.0


def double_pendulum(t, y, args):
    """Two unit masses on unit rods. The state is the two angles from the vertical and their rates."""
    a, b, u, v = y
    d = a - b
    scale = 2 - jnp.cos(d) ** 2
    g = 9.81
    du = (-g * (2 * jnp.sin(a) - jnp.cos(d) * jnp.sin(b)) - jnp.sin(d) * (v**2 + u**2 * jnp.cos(d))) / scale
    dv = (2 * g * (jnp.cos(d) * jnp.sin(a) - jnp.sin(b)) + jnp.sin(d) * (2 * u**2 + v**2 * jnp.cos(d))) / scale
    return jnp.stack([u, v, du, dv])


POINTS, LENGTH = 64, 22.0


def kuramoto_sivashinsky(t, y, args):
    """`u_t = -u u_x - u_xx - u_xxxx` with periodic boundaries, by central differences."""
    h = LENGTH / POINTS
    left, right = jnp.roll(y, 1), jnp.roll(y, -1)
    second = (left - 2 * y + right) / h**2
    fourth = (jnp.roll(second, 1) - 2 * second + jnp.roll(second, -1)) / h**2
    return -(right**2 - left**2) / (4 * h) - second - fourth


X = LENGTH * np.arange(POINTS) / POINTS
SYSTEMS = {
    "Lorenz-63": System(lorenz63, dfx.Tsit5(), np.ones(3), 50.0, 8192, 0, "x"),
    "Lorenz-96, D = 40": System(lorenz96, dfx.Tsit5(), 8 + np.sin(np.arange(40.0) ** 2), 5.0, 512, 0, "first variable"),
    "double pendulum": System(double_pendulum, dfx.Tsit5(), np.array([2.0, 2.0, 0.0, 0.0]), 40.0, 8192, 1, "outer angle"),
    "Kuramoto-Sivashinsky, D = 64": System(
        kuramoto_sivashinsky, dfx.Kvaerno5(), np.cos(2 * np.pi * X / LENGTH) + 0.1 * np.sin(4 * np.pi * X / LENGTH),
        48.0, 256, 8, "u(L / 8)",
    ),
}  # fmt: skip


def sequential_solver(system: System) -> dfx.AbstractSolver:
    """The system's solver. An implicit one gets tolerances, which it needs under a constant step size."""
    if isinstance(system.solver, dfx.AbstractImplicitSolver):
        return eqx.tree_at(lambda s: s.root_finder, system.solver, optx.Newton(rtol=1e-8, atol=1e-10))
    return system.solver


def seconds(run, y0s) -> float:
    times = []
    for y0 in y0s:
        start = time.perf_counter()
        jax.block_until_ready(run(y0))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def solve(name: str, system: System):
    """Solves one system, prints the statistics, and returns the data to draw."""
    term, y0 = dfx.ODETerm(system.field), jnp.asarray(system.y0)
    ts = jnp.linspace(0.0, system.t1, 513)
    solver = pdx.ParallelSolver(system.solver, system.num_steps, policy=pdx.AdaptivePolicy())

    def parallel(y0, saveat=dfx.SaveAt(t1=True)):
        return dfx.diffeqsolve(term, solver, 0.0, system.t1, system.t1, y0, saveat=saveat, max_steps=1)

    def sequential(y0, saveat=dfx.SaveAt(t1=True)):
        dt0, max_steps = system.t1 / system.num_steps, system.num_steps + 8
        return dfx.diffeqsolve(
            term, sequential_solver(system), 0.0, system.t1, dt0, y0, saveat=saveat, max_steps=max_steps
        )

    sol = jax.jit(lambda y: parallel(y, dfx.SaveAt(ts=ts, solver_state=True)))(y0)
    want = jax.jit(lambda y: sequential(y, dfx.SaveAt(ts=ts)))(y0).ys
    # This policy computes the trajectory of the estimate sequentially. That is faster on a CPU, and independent of `sol`.
    estimate = pdx.lyapunov_exponent(
        term, system.solver, 0.0, system.t1, y0, num_steps=system.num_steps,
        policy=pdx.policies.Sequential(),
    )  # fmt: skip
    y0s = [y0 * (1 + 1e-3 * k) for k in range(3)]
    fast, slow = (jax.jit(lambda y, f=f: f(y).ys) for f in (parallel, sequential))
    jax.block_until_ready((fast(y0), slow(y0)))
    ratio = seconds(slow, y0s[1:]) / seconds(fast, y0s[1:])

    stats = pdx.statistics(sol)
    difference = np.max(np.abs(sol.ys - want) / (1 + np.abs(want)), axis=1)
    apart = difference > 1e-6
    until = f"t = {ts[np.argmax(apart)]:.1f}" if apart.any() else "the end"
    print(f"{name}: {system.num_steps} steps over {system.t1:g} time units")
    print(f"  largest Lyapunov exponent {estimate.exponent:.3f}, a factor e in {1 / estimate.exponent:.2f} time units")
    print(
        f"  {stats.attempts} segments, {stats.iterations} iterations, {stats.parallel_steps} parallel steps, "
        f"{stats.sequential_steps} sequential steps; equal to sequential Diffrax to 1e-6 until {until}"
    )
    print(f"  {ratio:.2g} times as fast as sequential Diffrax on this {jax.default_backend().upper()}\n")
    return ts, sol.ys[:, system.component], difference, estimate


def draw(drawings: dict, path: pathlib.Path):
    matplotlib.use("Agg")
    size = (12, 2.6 * len(drawings))
    figure, axes = plt.subplots(len(drawings), 2, figsize=size, squeeze=False, constrained_layout=True)
    for (name, (ts, ys, difference, estimate)), (left, right) in zip(drawings.items(), axes):
        left.plot(ts, ys, lw=0.8)
        left.set(title=name, ylabel=SYSTEMS[name].label)
        right.plot(estimate.ts, estimate.growth / np.log(10), label="growth of a perturbation", lw=1)
        shown = difference > 0
        right.plot(ts[shown], np.log10(difference[shown]), ".", ms=3, label="difference from sequential Diffrax")
        right.set(title=f"exponent {estimate.exponent:.3f}", ylabel="log10")
        right.legend(fontsize=8)
    for ax in axes[-1]:
        ax.set(xlabel="t")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder of the picture")
    parser.add_argument("--stiff", action="store_true", help="solve the stiff system on a CPU too")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    path = options.out / "chaotic.png"
    drawings = {}
    for name, system in SYSTEMS.items():
        if (
            isinstance(system.solver, dfx.AbstractImplicitSolver)
            and jax.default_backend() == "cpu"
            and not options.stiff
        ):
            print(f"{name}: skipped on this CPU, where it takes long; add --stiff to solve it\n")
            continue
        drawings[name] = solve(name, system)
    draw(drawings, path)
    print(path.name, "written")


if __name__ == "__main__":
    main()
