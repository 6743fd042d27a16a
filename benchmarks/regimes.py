"""The map of regimes: what users call most, by default, beside Diffrax and beside the best alternative.

Each row is one cell: a problem, its number of steps or tolerance, the size of the batch, a solve or its gradient. `ours_ms`
is `parallel_diffrax.diffeqsolve` with nothing else changed, `solver_ms` Diffrax's function with only the solver changed
(`ParallelSolver(Tsit5())`, and `Windows()` for constant steps), `diffrax_ms` Diffrax. `by_hand_ms`, for constant steps, is
the fastest loop that we know how to write. `ratio` is Diffrax's time over ours, `to_best` that of the best alternative.
Compile times are apart. `difference` is the largest relative difference from Diffrax's result.
"""

from collections.abc import Callable, Iterator
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp

import parallel_diffrax as pdx

from . import harness
from .ensembles import lorenz
from .smooth_problems import hand_written, PROBLEMS


FHN = PROBLEMS["FitzHugh-Nagumo, T = 400"]
STEP = 400.0 / 16384


def wrapped(terms, solver, t0, t1, dt0, y0, args, stepsize_controller=dfx.ConstantStepSize(), **options):
    """Diffrax's function with nothing but the solver changed."""
    if isinstance(stepsize_controller, dfx.ConstantStepSize):
        stepsize_controller = pdx.Windows()
    options |= {"stepsize_controller": stepsize_controller}
    return dfx.diffeqsolve(terms, pdx.ParallelSolver(solver), t0, t1, dt0, y0, args, **options)


CALLS = {"diffrax": dfx.diffeqsolve, "ours": pdx.diffeqsolve, "solver": wrapped}


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    on_cpu = jax.default_backend() == "cpu"
    batches = (1, 16) if on_cpu else (1, 64, 1024)
    for num_steps in (64, 512) if quick else (64, 512, 4096):
        for gradient in (False, True):
            yield fixed(num_steps, 1, gradient)
    for batch in batches[1:] + (() if on_cpu else (131072,)):
        yield fixed(64 if quick else 512, batch, False)
    for tolerance in (1e-3, 1e-6) if quick else (1e-3, 1e-6, 1e-9):
        for gradient in (False, True):
            yield adaptive("FitzHugh-Nagumo", tolerance, 1, gradient)
    for batch in batches[1:]:
        yield adaptive("FitzHugh-Nagumo", 1e-6, batch, False)
        yield adaptive("Lorenz", 1e-6, batch, False)
    yield adaptive("FitzHugh-Nagumo", 1e-3, 1024, True)
    for outputs, event in ((100, False), (0, True)):
        yield with_outputs(outputs, event)
    for batch in () if on_cpu else (1024, 32768, 524288):
        yield adaptive("Lorenz, T = 1", 1e-8, batch, False)
    if not on_cpu:
        yield adaptive("Lorenz, T = 1", 1e-8, 32768, True)
    for gradient in (False, True) if on_cpu else (True,):
        for batch in (4, 32) if on_cpu else (32, 256):
            for num_steps in (None, 64):
                yield neural_ode(num_steps, batch, gradient)
    for num_steps in (1024, None) if on_cpu else ():
        for gradient in (False, True):
            yield cluster(num_steps, gradient)


def fixed(num_steps: int, batch: int, gradient: bool) -> dict:
    """FitzHugh-Nagumo with constant steps."""
    t1 = num_steps * STEP

    def end(call, y0):
        sol = call(FHN.term, dfx.Tsit5(), 0.0, t1, STEP, y0, FHN.args, max_steps=num_steps)
        return sol.ys[-1]

    by_hand = {}
    if not gradient:
        forms = [(scalars, unroll) for scalars in (False, True) for unroll in (1, 4)]
        by_hand = {form: hand_written(FHN, num_steps, form[1], t1, form[0]) for form in forms}
    row = {"problem": "FitzHugh-Nagumo", "steps": num_steps}
    return cell(row, end, jnp.asarray(FHN.y0), batch, gradient, by_hand)


def adaptive(problem: str, tolerance: float, batch: int, gradient: bool) -> dict:
    """A `PIDController`, end states only."""
    if problem == "FitzHugh-Nagumo":
        term, y0, t1 = FHN.term, jnp.asarray(FHN.y0), 100.0
        solve = lambda call, y0, controller: call(
            term, dfx.Tsit5(), 0.0, t1, None, y0, FHN.args, stepsize_controller=controller
        )
        example = y0
    else:
        term, t1 = dfx.ODETerm(lambda t, y, rho: lorenz(y, rho)), 1.0 if "T = 1" in problem else 10.0
        solve = lambda call, rho, controller: call(
            term, dfx.Tsit5(), 0.0, t1, None, jnp.array([1.0, 0.0, 0.0]), rho, stepsize_controller=controller
        )
        example = jnp.array(21.0)
    controller = dfx.PIDController(rtol=tolerance, atol=1e-3 * tolerance)
    end = lambda call, x: solve(call, x, controller).ys[-1]
    return cell({"problem": problem, "tolerance": tolerance}, end, example, batch, gradient, {})


def with_outputs(outputs: int, event: bool) -> dict:
    """A `PIDController` with many outputs, or with an event that happens at about a third of the time span."""
    controller, t1 = dfx.PIDController(rtol=1e-6, atol=1e-9), 40.0
    options: dict[str, Any] = {"saveat": dfx.SaveAt(ts=jnp.linspace(0.0, t1, outputs))} if outputs else {}
    if event:
        options["event"] = dfx.Event(lambda t, y, args, **kwargs: y[0] + 1.0)

    def ys(call, y0):
        return call(FHN.term, dfx.Tsit5(), 0.0, t1, None, y0, FHN.args, stepsize_controller=controller, **options).ys

    row = {"problem": "FitzHugh-Nagumo", "tolerance": 1e-6, "outputs": outputs, "event": event}
    return cell(row, ys, jnp.asarray(FHN.y0), 1, False, {})


def cluster(num_steps: int | None, gradient: bool) -> dict:
    """A star among 30 fixed ones: a field of many operations on small arrays."""
    places = jax.random.normal(jax.random.key(1), (30, 3)).tolist()

    def field(t, y, args):
        x, v = y[:3], y[3:]
        force = jnp.zeros(3)
        for place in places:
            apart = x - jnp.array(place)
            force = force - apart / (0.1 + jnp.sum(apart**2)) ** 1.5
        return jnp.concatenate([v, force])

    controller = dfx.PIDController(1e-6, 1e-9) if num_steps is None else dfx.ConstantStepSize()
    dt0 = None if num_steps is None else 4.0 / num_steps

    def end(call, y0):
        return call(dfx.ODETerm(field), dfx.Tsit5(), 0.0, 4.0, dt0, y0, None, stepsize_controller=controller).ys[-1]

    row = {"problem": "star cluster", "steps": num_steps, "tolerance": 1e-6 if num_steps is None else None}
    start = jnp.array([2.0, 0.5, 0.0, 0.0, 2.0, 1.0])
    return cell(row, end, start, 1, gradient, {})


def neural_ode(num_steps: int | None, batch: int, gradient: bool) -> dict:
    """A multilayer perceptron of width 64 with a state of 16 numbers, 20 outputs; a loss, or its gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((64, 16), (64, 64), (16, 64))
    weights = [0.3 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]
    term = dfx.ODETerm(lambda t, y, w: w[2] @ jnp.tanh(w[1] @ jnp.tanh(w[0] @ y)))
    starts, ts = jax.random.normal(keys[3], (batch, 16)), jnp.linspace(0.0, 1.0, 20)
    controller = dfx.PIDController(1e-3, 1e-3) if num_steps is None else dfx.ConstantStepSize()
    dt0 = None if num_steps is None else 1 / num_steps

    def loss(call, weights):
        one = lambda y0: (
            call(
                term, dfx.Tsit5(), 0.0, 1.0, dt0, y0, weights, saveat=dfx.SaveAt(ts=ts), stepsize_controller=controller
            ).ys
        )
        return jnp.mean(jax.vmap(one)(starts) ** 2)

    row = {"problem": "neural ODE", "steps": num_steps, "tolerance": 1e-3 if num_steps is None else None}
    inputs = [[w * (1 + 1e-3 * k) for w in weights] for k in range(3)]
    one = jax.value_and_grad if gradient else lambda loss: loss
    fns = {name: one(lambda w, call=call: loss(call, w)) for name, call in CALLS.items()}
    return measure(row | {"batch": batch, "gradient": gradient}, fns, inputs)


def cell(row: dict, end: Callable, example, batch: int, gradient: bool, by_hand: dict) -> dict:
    """The row of end states, or of the gradient of their squares, of a batch of inputs around an example."""
    members = jnp.linspace(0.9, 1.0, batch)
    inputs = [(1 + 1e-3 * k) * members.reshape(-1, *[1] * example.ndim) * example[None] for k in range(3)]
    inputs = [x[0] for x in inputs] if batch == 1 else inputs

    def program(call):
        many = (lambda x: end(call, x)) if batch == 1 else jax.vmap(lambda x: end(call, x))
        return jax.grad(lambda x: jnp.sum(many(x) ** 2)) if gradient else many

    fns: dict[Any, Callable] = {name: program(call) for name, call in CALLS.items()}
    fns |= {key: fn if batch == 1 else jax.vmap(fn) for key, fn in by_hand.items()}
    return measure(row | {"batch": batch, "gradient": gradient}, fns, inputs)


def measure(row: dict, fns: dict[Any, Callable], inputs: list) -> dict:
    """Compiles and times all sides, one after another."""
    values, hand = {}, []
    for name, fn in fns.items():
        program = harness.build(fn, inputs[0])
        if not isinstance(name, str):
            hand.append(harness.clock(program.call, inputs, 10)[1]["median_ms"])
            continue
        values[name], times = harness.clock(program.call, inputs, 10 if name == "diffrax" else 40)
        row |= {f"{name}_ms": times["median_ms"], f"{name}_compile_s": program.compile_s}
    alternatives = [row["diffrax_ms"], *hand]
    row |= {"by_hand_ms": min(hand)} if hand else {}
    row |= {"ratio": row["diffrax_ms"] / row["ours_ms"], "to_best": min(alternatives) / row["ours_ms"]}
    row |= {"solver_ratio": row["diffrax_ms"] / row["solver_ms"]}
    want = jax.tree.leaves(values["diffrax"])
    differ = lambda a, b: float(jnp.max(jnp.abs(a - b) / (1 + jnp.abs(b))))
    row |= {"difference": max(map(differ, jax.tree.leaves(values["ours"]), want))}
    return row | {"solver_difference": max(map(differ, jax.tree.leaves(values["solver"]), want))}
