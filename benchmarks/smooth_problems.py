"""Smooth initial value problems with known end states, and the methods of solving them that the benchmarks compare.

Every method is a function of the initial state, so that it can be timed on states that change from call to call.
"""

from collections.abc import Callable
from dataclasses import dataclass

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

import parallel_diffrax as pdx


@dataclass(frozen=True)
class Smooth:
    """A field `field(t, y, args)`, its initial state, end time and parameters. `scalars` is the same field as a function of
    `t` and of each component as a number, as one writes it by hand for the most speed."""

    field: Callable
    y0: np.ndarray
    t1: float
    args: np.ndarray | None = None
    scalars: Callable | None = None

    @property
    def term(self) -> dfx.ODETerm:
        return dfx.ODETerm(self.field)

    def starts(self, count: int) -> list:
        """The problem's initial state, followed by others close to it."""
        return [jnp.asarray(self.y0 * (1 + 1e-3 * k)) for k in range(count)]

    def error(self, y, reference) -> float:
        """The largest error of a component, relative to one plus its size; infinite if it is not finite."""
        y, reference = np.asarray(y, float).reshape(-1), np.asarray(reference, float)
        error = float(np.max(np.abs(y - reference) / (1 + np.abs(reference))))
        return error if np.isfinite(error) else float("inf")


def parallel(
    problem: Smooth, num_steps: int, t1: float | None = None, base: dfx.AbstractSolver = dfx.Tsit5(), **options
) -> Callable:
    """`diffeqsolve` with `ParallelSolver` in one window. Returns the end state and the counts of the solve."""
    solver = pdx.ParallelSolver(base, num_steps, **{"policy": pdx.AdaptivePolicy(), **options})
    t1 = problem.t1 if t1 is None else t1

    def solve(y0):
        saveat = dfx.SaveAt(t1=True, solver_state=True)
        sol = dfx.diffeqsolve(
            problem.term, solver, 0.0, t1, t1, y0, problem.args, saveat=saveat, max_steps=1, throw=False
        )
        statistics = pdx.statistics(sol)
        assert sol.ys is not None
        counts = {name: getattr(statistics, name) for name in COUNTS} | {
            "success": sol.result == dfx.RESULTS.successful
        }
        return sol.ys[-1], counts

    return solve


COUNTS = ("iterations", "attempts", "parallel_steps", "sequential_steps", "predictor_steps")


def counts_row(counts) -> dict:
    """The counts of a solve as entries of a row. For a batch: the largest counts, and whether all members succeeded."""
    row = {name: int(np.max(np.asarray(counts[name]))) for name in COUNTS}
    return row | {"success": bool(np.all(np.asarray(counts["success"])))}


def sequential(problem: Smooth, max_steps: int, step: float, base=dfx.Tsit5()) -> Callable:
    """Sequential Diffrax with equal steps, as a function of a pair of initial state and number of steps. Its time does not
    depend on `max_steps`, so that one program serves all lengths."""

    def solve(start):
        y0, count = start
        dt0, most = jnp.asarray(step), max_steps + 8
        sol = dfx.diffeqsolve(problem.term, base, 0.0, dt0 * count, dt0, y0, problem.args, max_steps=most)
        assert sol.ys is not None
        return sol.ys[-1]

    return solve


def adaptive(problem: Smooth, base, max_steps: int = 200_000) -> Callable:
    """Sequential Diffrax with adaptive steps, as a function of a pair of initial state and tolerance. Returns the end state,
    the number of steps, and whether the solve succeeded."""

    def solve(start):
        y0, tolerance = start
        sol = dfx.diffeqsolve(
            problem.term, base, 0.0, problem.t1, None, y0, problem.args,
            stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance), max_steps=max_steps, throw=False,
        )  # fmt: skip
        assert sol.ys is not None
        return sol.ys[-1], sol.stats["num_steps"], sol.result == dfx.RESULTS.successful

    return solve


def hand_written(
    problem: Smooth, num_steps: int, unroll: int, t1: float | None = None, scalars: bool = False
) -> Callable:
    """The loop by hand, without Diffrax: `lax.scan` over the steps of Tsit5, with its tableau unrolled.

    With `scalars`, the components of the state are separate numbers. This is the fastest form on a GPU, since XLA fuses a
    whole step into one kernel, and it needs a field written in scalars.
    """
    tableau = dfx.Tsit5.tableau
    ts = jnp.linspace(0.0, problem.t1 if t1 is None else t1, num_steps + 1)
    if scalars and problem.scalars is None:
        raise ValueError("`hand_written(..., scalars=True)`: this problem has no field in scalars.")

    def slope(t, y):
        if scalars:
            assert problem.scalars is not None
            return problem.scalars(t, *y)
        return (problem.field(t, y[0], problem.args),)

    def move(y, h, weights, slopes):
        return tuple(x + h * sum(float(w) * k[i] for w, k in zip(weights, slopes) if w != 0) for i, x in enumerate(y))

    def step(y, times):
        t0, t1 = times
        h = t1 - t0
        slopes = [slope(t0, y)]
        for a, c in zip(tableau.a_lower, tableau.c):
            slopes.append(slope(t0 + c * h, move(y, h, a, slopes)))
        return move(y, h, tableau.b_sol, slopes), None

    def solve(y0):
        y = tuple(y0) if scalars else (y0,)
        y = jax.lax.scan(step, y, (ts[:-1], ts[1:]), unroll=unroll)[0]
        return jnp.stack(y) if scalars else y[0]

    return solve


def fitzhugh_nagumo(t, y, args):
    v, w = y
    current, rate = args
    return jnp.stack([v - v**3 / 3 - w + current, rate * (v + 0.7 - 0.8 * w)])


def lotka_volterra(t, y, args):
    return jnp.stack([y[0] * (1.5 - y[1]), y[1] * (y[0] - 3.0)])


def van_der_pol(t, y, args):
    return jnp.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])


def kepler(t, y, args):
    return jnp.concatenate([y[2:], -y[:2] / jnp.sum(y[:2] ** 2) ** 1.5])


def ring(size: int) -> Smooth:
    """FitzHugh-Nagumo oscillators on a ring, each coupled to its neighbours. The state has `size` numbers, which is even."""

    def field(t, y, args):
        v, w = jnp.split(y, 2)
        coupling = 0.1 * (jnp.roll(v, 1) - 2 * v + jnp.roll(v, -1))
        return jnp.concatenate([v - v**3 / 3 - w + 0.5 + coupling, 0.08 * (v + 0.7 - 0.8 * w)])

    phase = 2 * np.pi * np.arange(size // 2) / (size // 2)
    return Smooth(field, np.concatenate([-1 + 0.3 * np.sin(phase), 1 + 0.3 * np.cos(phase)]), 100.0)


FITZHUGH_NAGUMO = Smooth(
    fitzhugh_nagumo,
    np.array([-1.0, 1.0]),
    400.0,
    np.array([0.5, 0.08]),
    lambda t, v, w: (v - v**3 / 3 - w + 0.5, 0.08 * (v + 0.7 - 0.8 * w)),
)
PROBLEMS = {
    "FitzHugh-Nagumo, T = 400": FITZHUGH_NAGUMO,
    "Lotka-Volterra, T = 100": Smooth(lotka_volterra, np.array([10.0, 1.0]), 100.0),
    "van der Pol, mu = 1, T = 200": Smooth(van_der_pol, np.array([2.0, 0.0]), 200.0),
    # The eccentricity is 0.3, the period 2 pi.
    "Kepler, T = 60": Smooth(kepler, np.array([0.7, 0.0, 0.0, (1.3 / 0.7) ** 0.5]), 60.0),
}
