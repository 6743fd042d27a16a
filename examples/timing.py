"""What the examples share: the same program with our solves and with those of Diffrax, timed and compared; a fit by
gradient; where the picture goes.
"""

import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.tree_util as jtu
import numpy as np
import optax

import parallel_diffrax as pdx


# How a program solves: by our function or by Diffrax's. Or, where another package calls Diffrax, by our solver around the
# one that is given or by that one.
FUNCTIONS = pdx.diffeqsolve, dfx.diffeqsolve
SOLVERS = pdx.ParallelSolver, lambda solver: solver


class Case(NamedTuple):
    """A program to compare. `make(way)` returns a function, which is called with `args`, for each of the two `ways`, ours
    first. The results should differ by at most `tolerance`, relative to one plus the largest number in each array."""

    make: Callable[[Callable], Callable]
    args: tuple
    tolerance: float = 1e-8
    ways: tuple[Callable, Callable] = FUNCTIONS


class Comparison(NamedTuple):
    """Our result; how many times as fast ours is as Diffrax's, without compilation; the largest relative difference."""

    value: Any
    ratio: float
    difference: float


def compare(case: Case, repeats: int = 5) -> Comparison:
    """Runs a case in both ways in turn, and compares the fastest calls. Raises if the results differ."""
    ours, theirs = (jax.jit(case.make(way)) for way in case.ways)
    values, times = [jax.block_until_ready(fn(*case.args)) for fn in (ours, theirs)], ([], [])
    for _ in range(repeats):
        for fn, spent in zip((ours, theirs), times):
            start = time.perf_counter()
            jax.block_until_ready(fn(*case.args))
            spent.append(time.perf_counter() - start)
    difference = 0.0
    for a, b in zip(*(jtu.tree_leaves(value) for value in values), strict=True):
        # NumPy's maximum keeps NaN.
        difference = np.maximum(difference, np.max(np.abs(np.asarray(a) - b) / (1 + np.max(np.abs(b)))))
    # Written so that NaN fails.
    if not difference <= case.tolerance:
        raise RuntimeError(f"the results differ by {difference:.1e}, where at most {case.tolerance:.0e} was expected")
    return Comparison(values[0], min(times[1]) / min(times[0]), float(difference))


def report(cases: dict[str, Case]) -> dict[str, Any]:
    """Prints the ratio of every case. Returns our results."""
    values = {}
    for name, case in cases.items():
        found = compare(case)
        print(f"  {name}: {found.ratio:.1f} times as fast as Diffrax, difference {found.difference:.0e}", flush=True)
        values[name] = found.value
    return values


def descend(loss: Callable, start: jax.Array, optimiser: optax.GradientTransformation, steps: int):
    """The unknowns that `steps` steps of the optimiser find, and the loss before each."""

    @jax.jit
    def step(unknowns, moments):
        value, gradient = jax.value_and_grad(loss)(unknowns)
        updates, moments = optimiser.update(gradient, moments)
        return optax.apply_updates(unknowns, updates), moments, value

    unknowns, moments, losses = start, optimiser.init(start), []
    for _ in range(steps):
        unknowns, moments, value = step(unknowns, moments)
        losses.append(float(value))
    return unknowns, losses


def picture(program: str) -> pathlib.Path:
    """The path that the program was given, or that of a picture beside it. `program` is its `__file__`."""
    return pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(program).with_suffix(".png")
