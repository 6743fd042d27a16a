"""FitzHugh-Nagumo with an output for every step: `ParallelAdjoint` against sequential Diffrax, end to end.

    python -m benchmarks.outputs [--quick] [--out FOLDER]

`SaveAt(ts=...)` has as many times as there are fine steps of `Tsit5`, in float64, over T = 400. Measured are the solve, and
the gradient of a loss on all saved states. The solve is also measured once with the same window and Diffrax's default
adjoint, under which Diffrax saves one output after another.
"""

import argparse
import pathlib
from collections.abc import Iterator

import diffrax as dfx
import jax
import jax.numpy as jnp

import parallel_diffrax as pdx

from . import harness


T = 400.0
Y0 = (-1.0, 1.0)
ARGS = (0.5, 0.08)


def field(t, y, args):
    v, w = y
    current, rate = args
    return jnp.stack([v - v**3 / 3 - w + current, rate * (v + 0.7 - 0.8 * w)])


TERM = dfx.ODETerm(field)


def output_times(num_steps):
    """As many times as steps, none of them at the end of a step."""
    return (jnp.arange(num_steps) + 0.4) * (T / num_steps)


def parallel(num_steps, adjoint):
    solver, saveat = (
        pdx.ParallelSolver(dfx.Tsit5(), num_steps, policy=pdx.AdaptivePolicy()),
        dfx.SaveAt(ts=output_times(num_steps)),
    )

    def solve(args):
        y0 = jnp.array(Y0)
        return dfx.diffeqsolve(TERM, solver, 0.0, T, T, y0, args, saveat=saveat, max_steps=1, adjoint=adjoint).ys

    return solve


def sequential(num_steps):
    saveat = dfx.SaveAt(ts=output_times(num_steps))

    def solve(args):
        dt0, y0 = T / num_steps, jnp.array(Y0)
        return dfx.diffeqsolve(TERM, dfx.Tsit5(), 0.0, T, dt0, y0, args, saveat=saveat, max_steps=num_steps + 8).ys

    return solve


def gradient(solve):
    """The gradient of the mean squared distance from a straight line, whose value differs for each output."""

    def loss(args):
        ys = solve(args)
        target = jnp.linspace(-1.0, 1.0, ys.shape[0])[:, None]
        return jnp.mean((ys - target) ** 2)

    return jax.grad(loss)


def compare(what, n, transform, repeats, with_stock) -> dict:
    inputs = [jnp.array(ARGS) * (1 + 0.01 * k) for k in range(4)]
    ours = jax.jit(transform(parallel(n, pdx.ParallelAdjoint())))
    theirs = jax.jit(transform(sequential(n)))
    values = []
    fast, slow = harness.measure(ours, inputs, repeats, values), harness.measure(theirs, inputs[:2], 1, values)
    detail = {"parallel": fast, "diffrax": slow}
    if with_stock:
        stock = jax.jit(transform(parallel(n, dfx.RecursiveCheckpointAdjoint())))
        detail["default_adjoint"] = harness.measure(stock, inputs[:2], 1)
    got, want = values
    return {
        "what": what,
        "N": n,
        "outputs": n,
        "parallel_ms": fast["median_ms"],
        "default_adjoint_ms": detail["default_adjoint"]["median_ms"] if with_stock else None,
        "diffrax_ms": slow["median_ms"],
        "speedup": slow["median_ms"] / fast["median_ms"],
        "difference": float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want))),
        "compile_s": fast["compile_s"],
        "detail": detail,
    }


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    solve, grad, repeats = (1024, 512, 5) if quick else (16384, 4096, 21)
    yield compare("solve", solve, lambda f: f, repeats, with_stock=True)
    yield compare("gradient", grad, gradient, repeats, with_stock=False)


def main():
    parser = argparse.ArgumentParser(description="An output at every step, parallel against sequential.")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a machine without a GPU")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder of the JSON file")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    found = list(rows(options.quick))
    path = harness.write(harness.result_name("outputs"), found, options.out)
    print(jax.devices()[0].device_kind, path)
    columns = ["what", "N", "outputs", "parallel_ms", "default_adjoint_ms", "diffrax_ms", "speedup", "difference"]
    print(harness.table(found, [*columns, "compile_s"]))


if __name__ == "__main__":
    main()
