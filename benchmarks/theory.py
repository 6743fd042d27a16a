"""The theory of parallel Newton methods, measured: what decides how many iterations a solve takes.

    python -m benchmarks --only theory
    python -m benchmarks.draw --platform cpu theory_exponent theory_rates theory_damping theory_policy
    python -m benchmarks.pages

The last command writes the tables of `docs/theory.md` from the results.

The theory is that of arXiv 2603.16850 and 2508.16817. `docs/theory.md` explains it and reads the results. The parts:

- `exponent`: Newton's iterations against the largest Lyapunov exponent, over three families whose exponent crosses zero, for
  several lengths, from a constant guess. `conditioning`: the smallest singular value of the linear system, between the two
  bounds that the growth of perturbations implies. `prefix`: after `k` iterations the first `k` steps are solved.
- `rate`: the rate of linear convergence of every approximate Jacobian, measured, predicted for the error, and bounded.
- `damping`: the largest iterate of Newton's method, with and without safeguards, and of ELK.
- `flow`: the nine flows of arXiv 2508.16817, table 1, under `AdaptivePolicy`; and observers of them, which are contracting.
- `policy`: what `AdaptivePolicy` does with a flow whose exponent per step grows.

All results are counts and norms. They depend on the machine only through rounding, and have no times. Scans are sequential
here, since these compile faster.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg as sparse
from jax import Array

import parallel_diffrax as pdx

from . import recurrences
from .chaos import flows as solve_flow
from .flows import lorenz63, lorenz96, NINE_FLOWS


SCAN = pdx.scans.SequentialScan()
NEWTON = pdx.ParallelNewton(scan=SCAN)


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    for name in list(FAMILIES)[:1] if quick else FAMILIES:
        yield from exponents(name, (64,) if quick else (64, 256, 1024), 2 if quick else None)
        yield from conditioning(name, 64 if quick else 256, 2 if quick else None)
    yield prefix(100 if quick else 1000)
    for name in list(LINEAR)[:1] if quick else LINEAR:
        yield from rates(name, 64 if quick else 200, quick)
    for name in list(OVERSHOOTING)[:1] if quick else OVERSHOOTING:
        yield from damping(name, OVERSHOOTING[name](), 8 if quick else 60)
    for name in [] if quick else NINE_FLOWS:
        yield from solve_flow(name, ("policy",))
        yield observer(name, 30_000)
    if quick:
        yield observer("Lorenz-63", 500)
    yield from policy(512 if quick else 8192, SPEEDS[-1:] if quick else SPEEDS)


# The sign of the exponent


class Family(NamedTuple):
    """Recurrences `y <- step(y, x, p)` from `init`, with the rows `x` of `inputs(N)`, for several values of `p`."""

    step: Callable[[Array, Array, Array], Array]
    init: Array
    inputs: Callable[[int], Array]
    parameter: str
    values: tuple[float, ...]


def _runge_kutta(field: Callable[[Array, Array], Array], dt: float) -> Callable[[Array, Array], Array]:
    """A step of the classical fourth-order method from time `t`."""

    def step(y, t):
        k1 = field(t, y)
        k2 = field(t + dt / 2, y + dt / 2 * k1)
        k3 = field(t + dt / 2, y + dt / 2 * k2)
        return y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + field(t + dt, y + dt * k3))

    return step


def _network() -> Family:
    """A random recurrent network, driven by noise. It is contracting below a gain of one, and chaotic above 1.4."""
    size, rng = 32, np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(size, size)) / np.sqrt(size))
    noise = lambda n: jnp.asarray(0.1 * np.random.default_rng(1).normal(size=(n, size)))
    step = lambda y, x, gain: gain * weights @ jnp.tanh(y) + x
    return Family(step, jnp.ones(size), noise, "gain", (0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 2.0, 3.0))


def _pendulum() -> Family:
    """A damped pendulum with a periodic torque of growing amplitude."""
    dt, frequency = 0.1, 2 / 3

    def step(y, t, torque):
        drive = lambda t: torque * jnp.cos(frequency * t)
        return _runge_kutta(lambda t, y: jnp.stack([y[1], drive(t) - 0.5 * y[1] - jnp.sin(y[0])]), dt)(y, t)

    times = lambda n: dt * jnp.arange(n, dtype=float)
    return Family(step, jnp.array([0.2, 0.0]), times, "torque", (0.2, 0.5, 0.9, 1.0, 1.07, 1.15, 1.2, 1.35, 1.5, 1.6))


def _lorenz96() -> Family:
    """Lorenz-96 with eight variables and growing forcing."""
    dt = 0.02
    step = lambda y, t, forcing: _runge_kutta(lambda t, y: lorenz96(y, forcing), dt)(y, t)
    init = jnp.asarray(1 + 0.5 * np.sin(np.arange(8.0) ** 2))
    times = lambda n: dt * jnp.arange(n, dtype=float)
    return Family(step, init, times, "forcing", (0.3, 0.6, 0.8, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0))


FAMILIES = {"random network": _network(), "driven pendulum": _pendulum(), "Lorenz-96, D = 8": _lorenz96()}


# Newton's method goes on until no step's defect is larger.
SOLVED = 1e-10


@eqx.filter_jit
def _newton(step, init, xs, p, max_steps):
    """Newton's iterations on all steps from a constant guess, until the residual is small, whatever the root finder's own
    test of convergence says. Returns the states, the largest defect and the number of iterations."""
    args, guess = (init, xs, p), jnp.broadcast_to(init, (xs.shape[0], init.size))

    def fn(y, args):
        init, xs, p = args
        return jax.vmap(lambda y, x: step(y, x, p))(jnp.concatenate([init[None], y[:-1]]), xs) - y, None

    # Written so that NaN is not small.
    small = lambda y: jnp.all(jnp.abs(fn(y, args)[0]) <= SOLVED)

    def body(carry):
        y, state, k = carry
        y, state, _ = NEWTON.step(fn, y, args, {}, state, frozenset())
        return y, state, k + 1

    state = NEWTON.init(fn, guess, args, {}, jax.eval_shape(lambda: guess), None, frozenset())
    y, _, k = lax.while_loop(lambda c: ~small(c[0]) & (c[2] < max_steps), body, (guess, state, 0))
    return y, jnp.max(jnp.abs(fn(y, args)[0])), k


@eqx.filter_jit
def _trajectory(step, init, xs, p):
    """All states, sequentially, and the Jacobians of the steps."""

    def body(y, x):
        after = step(y, x, p)
        return after, (after, jax.jacfwd(step)(y, x, p))

    return lax.scan(body, init, xs)[1]


@eqx.filter_jit
def _exponent(step, init, xs, p):
    estimate = pdx.diagnostics.scan_lyapunov_exponent(
        lambda y, x: (step(y, x, p), None), init, xs, policy=pdx.policies.Sequential(), scan=SCAN
    )
    return estimate.exponent


def exponents(name: str, lengths: tuple[int, ...], count: int | None) -> Iterator[dict]:
    """Newton's iterations on the members of a family, for sequences of several lengths. At most `N` iterations are made."""
    family = FAMILIES[name]
    for value in family.values[:count]:
        p, longest = jnp.array(value), family.inputs(max(lengths))
        # One exponent for all lengths, from a sequence as long as the longest.
        exponent = float(_exponent(family.step, family.init, longest, p))
        for n in lengths:
            xs = family.inputs(n)
            y, residual, iterations = _newton(family.step, family.init, xs, p, n)
            exact, _ = _trajectory(family.step, family.init, xs, p)
            yield {
                "what": "exponent",
                "problem": name,
                "parameter": family.parameter,
                "value": value,
                "N": n,
                "D": family.init.size,
                "exponent": exponent,
                "iterations": int(iterations),
                "success": bool(residual <= SOLVED),
                "residual": float(residual),
                "difference": float(jnp.max(jnp.abs(y - exact) / (1 + jnp.abs(exact)))),
            }


@eqx.filter_jit
def _solve_both(A, r):
    """`L^{-1} L^{-T} r`."""
    transitions = pdx.jacobians.DenseTransitions(A)
    return SCAN.solve(transitions, SCAN.solve(transitions, r, transpose=True))


def smallest_singular_value(A: np.ndarray) -> float:
    """The smallest singular value of `L`, where `(L d)[i] = d[i] - A[i] d[i-1]`. It comes from the norm of the inverse,
    whose blocks are products of Jacobians, and so is accurate even below rounding."""
    n, size = A.shape[:2]
    matrices = jnp.asarray(A)
    apply = lambda r: np.asarray(_solve_both(matrices, jnp.asarray(r.reshape(n, size)))).reshape(-1)
    inverse = sparse.LinearOperator((n * size, n * size), matvec=apply, dtype=float)  # pyright: ignore
    start = np.random.default_rng(0).normal(size=n * size)
    largest = sparse.eigsh(inverse, k=1, which="LA", v0=start, return_eigenvectors=False)
    return float(largest[0] ** -0.5)


def growth_bounds(A: np.ndarray, exponent: float) -> tuple[float, float, float, float]:
    """The constants `a` and `b` for which every product of `k` Jacobians in a row has a norm between `b exp(exponent k)` and
    `a exp(exponent k)`, and the two bounds of the smallest singular value of `L` that follow from them."""
    n = A.shape[0]
    products, largest, smallest = np.eye(A.shape[1])[None], 1.0, 1.0
    for k in range(1, n):
        # Products of `k` Jacobians that end at the steps `k .. n - 1`. That of the first step is not in `L`.
        before = products[: n - k] if k > 1 else np.broadcast_to(products, (n - 1, *products.shape[1:]))
        products = A[k:] @ before
        norms = np.linalg.norm(products, 2, axis=(1, 2)) / math.exp(exponent * k)
        largest, smallest = max(largest, float(norms.max())), min(smallest, float(norms.min()))
    # The sum of `exp(exponent k)` for `k = 0 .. n - 1` is the geometric one.
    total = math.fsum(math.exp(exponent * k) for k in range(n))
    return largest, smallest, 1 / (largest * total), min(1.0, math.exp(-exponent * (n - 1)) / smallest)


def conditioning(name: str, n: int, count: int | None) -> Iterator[dict]:
    """The smallest singular value of `L` at the solution, between its bounds."""
    family = FAMILIES[name]
    for value in family.values[:count]:
        p, xs = jnp.array(value), family.inputs(n)
        exponent = float(_exponent(family.step, family.init, xs, p))
        A = np.asarray(_trajectory(family.step, family.init, xs, p)[1])
        a, b, lower, upper = growth_bounds(A, exponent)
        yield {
            "what": "conditioning",
            "problem": name,
            "parameter": family.parameter,
            "value": value,
            "N": n,
            "exponent": exponent,
            "a": a,
            "b": b,
            "lower_bound": lower,
            "singular_value": smallest_singular_value(A),
            "upper_bound": upper,
        }


def prefix(n: int) -> dict:
    """How many leading steps each of the first iterations solves at least: Jacobi's method, the poorest approximation, on a
    recurrence that grows."""
    step = lambda y, x: (1.02 * y + 0.1 * jnp.sin(y) + x, None)
    finder = pdx.ParallelNewton(jacobian=pdx.jacobians.Zero(), scan=SCAN)
    history = pdx.diagnostics.convergence_history(
        step, jnp.ones(1), jnp.zeros((n, 1)), root_finder=finder, num_iterations=min(n, 40)
    )
    solved = np.cumprod(np.asarray(history.error) == 0, axis=1).sum(axis=1)
    made = np.arange(len(solved))
    return {
        "what": "prefix",
        "N": n,
        "iterations": int(made[-1]),
        "fewest_solved_minus_iterations": int(np.min(solved - made)),
    }


# Linear rates


def _coupled() -> tuple[Callable, Array, Callable[[int], Array]]:
    """A slowly contracting recurrence with weak coupling, driven by noise."""
    size, rng = 8, np.random.default_rng(0)
    rotation = jnp.asarray(np.linalg.qr(rng.normal(size=(size, size)))[0])
    noise = lambda n: jnp.asarray(0.3 * np.random.default_rng(1).normal(size=(n, size)))
    return lambda y, x: 0.99 * y + 0.004 * jnp.sin(rotation @ y) + x, jnp.zeros(size), noise


def _forgetful() -> tuple[Callable, Array, Callable[[int], Array]]:
    """The contracting network of the comparison of the family, which forgets within a few steps."""
    problem = recurrences.mlp(2000, 16)
    return problem.step, problem.init, lambda n: problem.xs[:n]


LINEAR = {"slow, weakly coupled": _coupled(), "network, D = 16": _forgetful()}


def rates(name: str, n: int, quick: bool) -> Iterator[dict]:
    """Rates on the first iterations of every approximation, and the two numbers whose product bounds them."""
    step, init, inputs = LINEAR[name]
    xs = inputs(n)
    for label, jacobian in list(recurrences.approximations(init.size).items())[
        2 if quick else 0 : 4 if quick else None
    ]:
        finder = pdx.ParallelNewton(jacobian=jacobian, scan=SCAN)
        history = pdx.diagnostics.convergence_history(
            lambda y, x: (step(y, x), None), init, xs, root_finder=finder, num_iterations=60
        )
        total = np.linalg.norm(history.error, axis=1)
        # Above the size of rounding errors, which follow no theory.
        last = int(np.argmax(total < 1e-11 * total[0])) or len(total) - 1
        measured, predicted = (np.asarray(x)[:last] for x in (history.measured_rate, history.predicted_rate))
        linear = in_linear_range(total[: last + 1] / total[0])
        row = {
            "what": "rate",
            "problem": name,
            "jacobian": label,
            "N": n,
            "iterations": last,
            "bound": float(history.rate_bound),
            "errors": (total[: last + 1] / total[0]).tolist(),
        }
        if jacobian.exact:
            # `log e[k+1] / log e[k]` tends to the order.
            known = total[1 : last + 1] > 0
            logs = np.log(total[: last + 1] / total[0])
            orders = (logs[2:] / logs[1:-1])[: max(0, int(known.sum()) - 1)]
            yield row | {"orders": orders.tolist()}
            continue
        accuracy, stability = _factors(step, init, xs, finder)
        yield row | {
            "measured": measured.tolist(),
            "predicted": predicted.tolist(),
            "linear_iterations": int(linear.sum()),
            "largest_deviation": float(np.max(np.abs(measured / predicted - 1)[linear])) if linear.any() else None,
            "accuracy": accuracy,
            "stability": stability,
            "product": accuracy * stability,
        }


def in_linear_range(errors: np.ndarray) -> np.ndarray:
    """The iterations in which the error, relative to the first, is so small that the equations are linear, and larger than
    rounding."""
    return (errors[:-1] < 1e-3) & (errors[1:] > 1e-10)


def _factors(step, init, xs, finder) -> tuple[float, float]:
    """How far the approximation is from the Jacobians, `max |A[i] - A~[i]|`, and how its recurrence amplifies,
    `|L~^{-1}|`, both in the spectral norm at the solution."""
    y, A = _trajectory(lambda y, x, _: step(y, x), init, xs, None)

    def residual(y):
        return jax.vmap(step)(jnp.concatenate([init[None], y[:-1]]), xs) - y, None

    _, transitions, _ = finder.jacobian.linearise(residual, y)
    # Row `i` of `apply` on unit vectors is a column of `A~[i]`.
    columns = [transitions.apply(jnp.broadcast_to(e, y.shape)) for e in jnp.eye(init.size)]
    approximate = np.stack(columns, axis=2)
    accuracy = np.linalg.norm((np.asarray(A) - approximate)[1:], 2, axis=(1, 2)).max()
    return float(accuracy), 1 / smallest_singular_value(approximate)


# Damping


OVERSHOOTING = {
    "tanh, N = 2000": lambda: recurrences.tanh(2000),
    "van der Pol": recurrences.van_der_pol,
    "FitzHugh-Nagumo": recurrences.fitzhugh_nagumo,
}


def damping(name: str, problem: recurrences.Problem, count: int) -> Iterator[dict]:
    """The largest number in every iterate, and the mean squared residual."""
    methods = {"Newton without safeguards": None, "ParallelNewton": NEWTON, "ELK": pdx.ELK(scan=SCAN)}
    exact = problem.sequential()
    for method, finder in methods.items():
        ys = _iterates(problem, finder, count)
        largest = np.asarray(jnp.max(jnp.abs(ys), axis=(1, 2)))
        # NumPy's maximum keeps NaN.
        difference = np.max(np.abs(np.asarray(ys) - np.asarray(exact)) / (1 + np.abs(exact)), axis=(1, 2))
        finite = np.isfinite(np.asarray(ys)).all(axis=(1, 2))
        solved = finite & (difference < 1e-8)
        yield {
            "what": "damping",
            "problem": name,
            "method": method,
            "N": problem.xs.shape[0],
            "largest_state": float(jnp.max(jnp.abs(exact))),
            "largest_iterate": float(np.max(largest[finite])),
            "first_overflow": None if finite.all() else int(np.argmin(finite)),
            "first_solved": int(np.argmax(solved)) if solved.any() else None,
            "largest": [float(x) if math.isfinite(x) else None for x in np.where(finite, largest, np.inf)],
        }


def _iterates(problem: recurrences.Problem, finder, count: int) -> Array:
    """The guess and `count` iterates."""
    guess = jnp.broadcast_to(problem.init, (problem.xs.shape[0], problem.init.size))
    args = (problem.init, problem.xs)
    if finder is None:

        def iterate(y, _):
            r, transitions, _ = pdx.jacobians.Dense().linearise(lambda y: (problem.residual(y, args), None), y)
            return y + SCAN.solve(transitions, r), y

        return jax.jit(lambda: lax.scan(iterate, guess, None, count + 1)[1])()

    fn = lambda y, args: (problem.residual(y, args), None)
    start = finder.init(fn, guess, args, {}, jax.eval_shape(lambda: guess), None, frozenset())

    def body(carry, _):
        y, state = carry
        after, state, _ = finder.step(fn, y, args, {}, state, frozenset())
        return (after, state), y

    return jax.jit(lambda: lax.scan(body, (guess, start), None, count + 1)[1])()


# Flows

# The components of the state that the observer of each flow is given. It also corrects its state by the error of the sum of
# all components. With both, it forgets its initial state.
OBSERVED = {
    "ABC": (0, 2),
    "Chua": (1,),
    "Kawczynski-Strizhak": (0, 1),
    "Lorenz-63": (1,),
    "Nose-Hoover": (0, 2),
    "Roessler": (1,),
    "Sprott B": (1,),
    "Thomas": (1,),
    "Vallis": (1,),
}


def observer(name: str, n: int) -> dict:
    """Newton's iterations from a constant guess on an observer of a flow: the same Euler steps from another initial state,
    with some components replaced by those of the flow before each step, and a correction by the sum of all."""
    flow, dt = NINE_FLOWS[name], 0.01
    euler = lambda y: y + dt * flow.field(y)
    y0 = jnp.asarray(flow.y0)
    observed = lax.scan(lambda y, _: (euler(y), y), y0, None, n)[1]
    given = jnp.isin(jnp.arange(y0.size), jnp.array(OBSERVED[name]))
    step = lambda y, x, _: euler(jnp.where(given, x, y)) + dt * jnp.sum(x - y)
    init = y0 + 0.5
    exponent = _exponent(step, init, observed, None) / dt
    y, residual, iterations = _newton(step, init, observed, None, 1000)
    exact, _ = _trajectory(step, init, observed, None)
    return {
        "what": "observer",
        "problem": name,
        "N": n,
        "observed": list(OBSERVED[name]),
        "exponent": float(exponent),
        "iterations": int(iterations),
        "success": bool(residual <= SOLVED),
        "difference": float(jnp.max(jnp.abs(y - exact) / (1 + jnp.abs(exact)))),
    }


# The policy

# The factors by which time passes faster. The step size stays the same, so the exponent per step grows.
SPEEDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0)


def policy(n: int, speeds: tuple[float, ...]) -> Iterator[dict]:
    """What `AdaptivePolicy` does with Lorenz-63 by Tsit5, step size 0.001, at growing speed."""
    term, span = dfx.ODETerm(lambda t, y, speed: speed * lorenz63(y)), 1e-3 * n
    solver = pdx.ParallelSolver(dfx.Tsit5(), n, root_finder=NEWTON, policy=pdx.AdaptivePolicy())
    saveat = dfx.SaveAt(t1=True, solver_state=True)
    # On the attractor, which it reaches in ten units of its own time.
    y0 = dfx.diffeqsolve(dfx.ODETerm(lambda t, y, _: lorenz63(y)), dfx.Tsit5(), 0, 10.0, 0.01, jnp.ones(3)).ys
    assert y0 is not None
    y0 = y0[-1]
    solve = jax.jit(lambda speed: dfx.diffeqsolve(term, solver, 0.0, span, span, y0, speed, saveat=saveat, max_steps=1))
    exponent_of = jax.jit(
        lambda speed: (
            pdx.lyapunov_exponent(
                term, dfx.Tsit5(), 0.0, span, y0, speed, num_steps=n, scan=SCAN, policy=pdx.policies.Sequential()
            ).exponent
        )
    )
    for speed in speeds:
        statistics = pdx.statistics(solve(jnp.array(speed)))
        iterations, made = int(statistics.iterations), int(statistics.sequential_steps)
        guesses = int(statistics.predictor_steps)
        # An iteration is as deep as its scan. Everything else is one step after the other.
        depth = made + guesses + iterations * 2 * math.ceil(math.log2(n))
        yield {
            "what": "policy",
            "problem": "Lorenz-63",
            "speed": speed,
            "N": n,
            "exponent_per_step": float(exponent_of(jnp.array(speed))) * span / n,
            "attempts": int(statistics.attempts),
            "iterations": iterations,
            "sequential_steps": made,
            "predictor_steps": guesses,
            "depth": depth,
            "steps_over_depth": n / depth,
        }
