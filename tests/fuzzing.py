"""A fuzzer: random fields, grids and options, against Diffrax's own steps one after the other.

What must hold of every case: if the result says success, then every state is finite, every step's equation holds to
the root finder's tolerance or to rounding, and every output agrees with the sequential solve as far as its conditioning
allows; and what the sequential solve can do, a policy that finishes in sequence can.

Compiling is the cost. So a `Config` is all that is static, and everything else about a `Case` is an argument of one
compiled program: the field is a sum of terms with weights.

A third of the configurations use the defaults: `ParallelSolver(solver)`, which is held to the same, and
`parallel_diffrax.diffeqsolve`, which is held to `diffrax.diffeqsolve` (`fuzz_front_door.py`).

Every case is compared, or counted with the reason why it cannot be: beyond a point where tiny disturbances of the steps in
sequence change everything, for example, nothing is determined. Derivatives are compared with those of the steps in sequence
on the same grid, and those of a failed solve must be NaN.

`python -m tests.fuzzing 2000` makes a long run, with another configuration every 40 cases, under JAX's strict settings.
"""

import argparse
import collections
import dataclasses
import functools
import importlib
import sys
import time
import traceback
import warnings
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optimistix as optx
from hypothesis import given, HealthCheck, Phase, seed, settings, strategies as st

import parallel_diffrax as pdx

from . import fuzz_front_door
from .fuzz_front_door import FrontDoor
from .fuzz_reference import compare, event_tolerance, tangent_of


NUM_TS = 9
IMPLICIT_EXPLICIT = (dfx.KenCarp3, dfx.KenCarp4, dfx.KenCarp5, dfx.Sil3)
# Stochastic solvers for additive noise only.
ADDITIVE = (dfx.ShARK, dfx.SRA1, dfx.SEA)


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a program is compiled for."""

    solver: dfx.AbstractSolver = dfx.Bosh3()
    # `None`: the default.
    num_steps: int | None = 40
    root_finder: str = "newton"
    predictor: Any = pdx.CoarsePredictor()
    policy: Any = pdx.AdaptivePolicy()
    controller: str = "constant"
    dtype: Any = jnp.float64
    size: int = 3
    # The sizes of nested ensembles.
    batch: tuple[int, ...] = ()
    container: str = "array"
    # Whether the equation is stochastic.
    noise: bool = False
    # "up", "down", "any": when `condition` changes its sign; "bool": when it is positive.
    event: str | None = None
    # "reverse" or "forward".
    derivative: str | None = None
    adjoint: dfx.AbstractAdjoint = dfx.RecursiveCheckpointAdjoint()
    # The terms of the field: all of them, or a few, which compile sooner.
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything else, as numbers."""

    t0: float
    span: float
    windows: float
    rtol: float
    y0: tuple[float, ...]
    weights: dict[str, float]
    nan_t: float
    nan_y: float
    inf_y: float
    ts: tuple[float, ...]
    # Where a term is switched on and off, in parts of the span.
    pulse: tuple[float, float]
    level: float
    key: float
    # Of an adaptive solve by the front door.
    tolerance: float = 1e-3


ROOT_FINDERS = {
    "newton": lambda rtol: pdx.ParallelNewton(rtol=rtol),
    "diagonal": lambda rtol: pdx.ParallelNewton(rtol=rtol, jacobian=pdx.jacobians.Diagonal()),
    "clipped": lambda rtol: pdx.ParallelNewton(rtol=rtol, jacobian=pdx.jacobians.Clipped(pdx.jacobians.Diagonal())),
    "picard": lambda rtol: pdx.ParallelNewton(rtol=rtol, jacobian=pdx.jacobians.Identity()),
    "jacobi": lambda rtol: pdx.ParallelNewton(rtol=rtol, jacobian=pdx.jacobians.Zero()),
    "associative": lambda rtol: pdx.ParallelNewton(rtol=rtol, scan=pdx.scans.AssociativeScan()),
    "elk": lambda rtol: pdx.ELK(rtol=rtol),
    "elk-diagonal": lambda rtol: pdx.ELK(rtol=rtol, jacobian=pdx.jacobians.Diagonal()),
}
WEIGHTS = {
    "damp": (0.0, 0.3, 3.0),
    "rotate": (0.0, 1.0, 10.0),
    "cubic": (0.0, 1.0, 5.0),
    "chaos": (0.0, 1.0),
    "stiff": (0.0, 10.0, 1e3),
    "jump": (0.0, 1.0, 30.0),
    "square": (0.0, 0.3, 1.0),
    "grow": (0.0, 1.0, 5.0),
    "force": (0.0, 1.0),
    "root": (0.0, 1.0),
    "pulse": (0.0, 1.0, 50.0),
}
# Implicit-explicit methods treat these terms implicitly.
STIFF = ["damp", "stiff"]


def field(t, y, case, names):
    """A sum of terms. Those of weight zero are not there, even if they are not finite."""
    x, v, w = y[0], y[-1], case["weights"]
    # The derivative of a root that is not there must be finite.
    positive = jnp.where(w["root"] != 0, y, jnp.ones_like(y))
    on, off = (case["t0"] + case["span"] * part for part in case["pulse"])
    switched = (t - on) * (t - off) <= 0
    lorenz = lambda: jnp.stack([10 * (y[1] - x), x * (28 - v) - y[1], x * y[1] - 8 / 3 * v])
    terms = {
        "damp": lambda: -y,
        "rotate": lambda: (
            jnp.roll(y, 1) * jnp.where(jnp.arange(len(y)) == 0, -1, 1) if len(y) > 1 else jnp.zeros_like(y)
        ),
        "cubic": lambda: jnp.zeros_like(y).at[-1].set((1 - x**2) * v),
        "chaos": lambda: lorenz() if len(y) == 3 else jnp.sin(5 * y),
        "stiff": lambda: jnp.cos(t) - y,
        "jump": lambda: jnp.where(y > 0.1, -1.0, 1.0),
        "square": lambda: y**2,
        "grow": lambda: y,
        "force": lambda: jnp.full_like(y, jnp.cos(3 * t)),
        "root": lambda: -jnp.sqrt(positive),
        "pulse": lambda: jnp.where(switched, jnp.ones_like(y), jnp.zeros_like(y)),
    }
    total = jnp.zeros_like(y)
    for name in names:
        total = total + jnp.where(w[name] != 0, w[name] * terms[name](), 0).astype(y.dtype)
    if set(names) <= set(STIFF):
        return total
    total = jnp.where((t > case["nan_t"]) | (x > case["nan_y"]), jnp.nan, total)
    return jnp.where(x > case["inf_y"], jnp.inf, total)


def pack(y, container):
    if container == "dict":
        return {"first": y[0], "rest": (y[1:], None)}
    return lax.complex(y[0], y[1]) if container == "complex" else y


def unpack(tree, container):
    if container == "dict":
        return jnp.concatenate([tree["first"][None], tree["rest"][0]])
    return jnp.stack([tree.real, tree.imag]) if container == "complex" else tree


def terms_of(config: Config | FrontDoor, case, direction=1, container="array"):
    """The terms of the case. The reference solves for vectors, in the direction of time of Diffrax's steps."""
    explicit, implicit = vector_fields(config, case, direction)
    wrap = lambda field: dfx.ODETerm(lambda t, y, _: pack(field(t, unpack(y, container)), container))
    if config.noise:
        return dfx.MultiTerm(wrap(lambda t, y: explicit(t, y) + implicit(t, y)), noise(config, case))
    if isinstance(config.solver, IMPLICIT_EXPLICIT):
        return dfx.MultiTerm(wrap(explicit), wrap(implicit))
    return wrap(lambda t, y: explicit(t, y) + implicit(t, y))


def vector_fields(config: Config | FrontDoor, case, direction=1):
    """The parts of the field that implicit-explicit methods treat explicitly and implicitly."""
    used = config.names or WEIGHTS
    parts = [sorted(set(used) - set(STIFF)), [name for name in STIFF if name in used]]
    return tuple(lambda t, y, names=names: direction * field(direction * t, y, case, names) for names in parts)


def noise(config: Config | FrontDoor, case):
    """Noise of its own for each component, proportional to a bounded function of it where the solver allows that."""
    area = dfx.SpaceTimeTimeLevyArea if isinstance(config.solver, dfx.SlowRK) else dfx.SpaceTimeLevyArea
    # (Diffrax makes the path, and only its values take part in the solve.)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        shape, key = jax.ShapeDtypeStruct((config.size,), config.dtype), jr.key(case["key"].astype(int))
        # No step ends at a node of the tree, where a rounding error of time is one of size `sqrt(eps)` in the path.
        ends = case["t0"] - 0.1234567 * case["span"], case["t0"] + 1.0765432 * case["span"]
        path = dfx.VirtualBrownianTree(*ends, 1e-3 * case["span"], shape, key, area)
    additive = isinstance(config.solver, ADDITIVE)
    amplitude = lambda y: jnp.full_like(y, 0.3) if additive else 0.3 * jnp.cos(y)
    return dfx.ControlTerm(lambda t, y, _: lx.DiagonalLinearOperator(amplitude(y)), path)


def condition(t, y, case):
    """The value whose change of sign is the event."""
    return y[0] - case["level"]


def solve(config: Config, case) -> dfx.Solution:
    """`diffeqsolve` in parallel."""
    root_finder = ROOT_FINDERS[config.root_finder](case["rtol"].astype(config.dtype))
    solver = pdx.ParallelSolver(config.solver, config.num_steps, root_finder, 32, config.predictor, config.policy)
    t0, span = case["t0"], case["span"]
    dt0, max_steps, controller = span / case["windows"], 6, dfx.ConstantStepSize()
    if config.controller in ("pid", "clip"):
        max_steps, controller = 24, dfx.PIDController(rtol=1e-3, atol=1e-5)
    if config.controller == "clip":
        controller = dfx.ClipStepSizeController(controller, jump_ts=t0 + span * case["pulse"])
    if config.controller == "to":
        dt0, controller = None, dfx.StepTo(t0 + span * jnp.asarray([0.0, 0.2, 0.25, 0.7, 1.0], config.dtype))
    if config.controller == "windows":
        dt0, controller = dt0 / (config.num_steps or 40), pdx.Windows()
    elif config.num_steps is None and config.controller == "constant":
        # Each step is a window.
        dt0, max_steps = dt0 / 8, 40
    subs = {"t1": dfx.SubSaveAt(t1=True)}
    if config.event is None:
        subs["ts"] = dfx.SubSaveAt(ts=t0 + span * case["ts"])
    return dfx.diffeqsolve(
        terms_of(config, case, container=config.container), solver, t0, t0 + span, dt0,
        pack(case["y0"], config.container), throw=False, max_steps=max_steps, adjoint=config.adjoint,
        saveat=dfx.SaveAt(subs=subs, dense=True, solver_state=True), stepsize_controller=controller,
        event=None if config.event is None else event_of(config, case),
    )  # fmt: skip


def event_of(config: Config | FrontDoor, case):
    def cond_fn(t, y, args, **kwargs):
        value = condition(t, unpack(y, config.container), case)
        return value > 0 if config.event == "bool" else value

    tolerance = event_tolerance(config)
    direction = {"up": True, "down": False}.get(config.event)
    return dfx.Event(cond_fn, optx.Newton(rtol=tolerance, atol=tolerance), direction)


def loss_of(final, outputs, t):
    """A number that depends on all that is saved."""
    rng = np.random.default_rng(1)
    total = jnp.sum(final * jnp.asarray(rng.normal(size=final.shape), final.dtype))
    if outputs is None:
        return total + t
    return total + jnp.sum(outputs * jnp.asarray(rng.normal(size=outputs.shape), final.dtype))


def differentiate(config: Config, case):
    """The solution, and the derivative of its loss by the initial state and the weights: all of it in reverse mode, along a
    direction in forward mode."""
    params = {"y0": case["y0"], "weights": case["weights"]}

    def loss(params):
        sol = solve(config, case | params)
        final = unpack(jax.tree.map(lambda x: x[0], sol.ys["t1"]), config.container)
        outputs = None if config.event else jax.vmap(lambda y: unpack(y, config.container))(sol.ys["ts"])
        return loss_of(final, outputs, sol.ts["t1"][0]), sol

    leaves, structure = jax.tree.flatten(params)
    if config.derivative == "forward":
        flat = jnp.asarray(tangent_of(sum(leaf.size for leaf in leaves)), config.dtype)
        parts = jnp.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
        tangent = structure.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves)])
        (_, sol), (derivative, _) = eqx.filter_jvp(loss, (params,), (tangent,))
        return sol, derivative
    (_, sol), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(params)
    return sol, jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(gradient)])


def examine(config: Config, case):
    """Solves one case, and compares. **Returns:** numbers to judge by."""
    sol, gradient = (solve(config, case), None) if config.derivative is None else differentiate(config, case)
    # The comparison need not be strict, the solve must be.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        direction = jnp.where(case["t0"] < case["t0"] + case["span"], 1, -1).astype(config.dtype)
        terms = lambda case: terms_of(config, case, direction)
        fields = lambda case: vector_fields(config, case, direction)
        tree = lambda y: unpack(y, config.container)
        return compare(config, case, sol, gradient, tree, condition, loss_of, fields, terms)


def answer(config: FrontDoor, solve, case):
    """The front door's answer to one case, or Diffrax's."""
    return fuzz_front_door.answer(config, case, solve, terms_of, pack, unpack, event_of)


def judge(config: Config, seen) -> tuple[list[str], list[str]]:
    """What is wrong with what was seen (nothing, one hopes), and what could be compared, or why it could not."""
    wrong, outcome = [], []
    may_fail = config.controller in ("pid", "clip") or isinstance(config.policy, pdx.policies.ParallelOnly)
    if seen["success"] or seen["occurred"]:
        for name in ("finite", "outputs_finite", "empty_is_y0"):
            if not seen[name]:
                wrong.append(f"success, but not {name}")
        if seen["success"] and not seen["arrived"]:
            wrong.append("success, but not arrived")
        if seen["defect_is_nan"] or not seen["defect"] <= 1:
            wrong.append(f"success, but a step's defect is {seen['defect']} times what is allowed")
        for name in ("apart", "output_apart"):
            if not seen[name] <= 1:
                wrong.append(f"success, but {name} by {seen[name]} times what is allowed")
        if not seen["sequential_finite"] and not seen["lost"] and not seen["occurred"]:
            wrong.append("success, but the sequential solve is not finite")
        outcome.append("values: compared in part, then not determined" if seen["lost"] else "values: compared")
    elif seen["max_steps"]:
        outcome.append("values: not compared, too few windows")
    elif not (seen["sequential_finite"] and seen["reached_end"]):
        outcome.append("values: reported as failed where the sequential solve ends or is not finite")
    elif seen["lost"]:
        outcome.append("values: reported as failed where the sequential solve is not determined")
    elif seen["explodes"] and isinstance(config.solver, dfx.AbstractImplicitSolver):
        outcome.append("values: reported as failed, implicit steps that explode")
    elif not seen.get("event_found", True):
        outcome.append("values: reported as failed where the sequential search for the time of the event fails")
    elif may_fail:
        outcome.append("values: reported as failed by a configuration that may")
    else:
        wrong.append("failure where the sequential solve succeeds")
    if config.event is not None and (seen["success"] or seen["occurred"]):
        if seen["event_determined"] and not seen["event_right"]:
            wrong.append("the event is not where the sequential solve has it")
        if seen["event_determined"] and not seen["event_at_zero"]:
            wrong.append("the event is not at a zero of its condition")
        outcome.append(f"event: {'compared' if seen['event_determined'] else 'its step is not determined'}")
    if config.derivative is not None:
        if seen["success"] or seen["occurred"]:
            determined = seen["derivative_determined"] and not seen["lost"]
            determined = determined and (config.event is None or seen["event_determined"])
            # A member of a batch with an event at the start evaluates the field there, which may be infinite.
            may_be_nan = bool(config.batch) and seen["steps"] == 0 and np.isnan(seen["derivative_apart"])
            determined = determined and not may_be_nan
            if determined and not seen["derivative_apart"] <= 1:
                wrong.append(f"the derivative is apart by {seen['derivative_apart']} times what is allowed")
            outcome.append(f"derivative: {'compared' if determined else 'not determined'}")
        elif seen["max_steps"]:
            outcome.append("derivative: not compared, too few windows")
        else:
            if not seen["derivative_is_nan"]:
                wrong.append("a failed solve has a derivative that is not NaN")
            outcome.append("derivative: NaN, since the solve failed")
    return wrong, outcome


@functools.cache
def front_door_programs(config: FrontDoor):
    """Our program, and that of Diffrax, which need not be strict, for one member of a batch."""
    ours = functools.partial(answer, config, pdx.diffeqsolve)
    for _ in config.batch:
        ours = jax.vmap(ours)
    theirs = jax.jit(functools.partial(answer, config, dfx.diffeqsolve))

    def tolerant(args):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return theirs(args)

    return jax.jit(ours), tolerant


@functools.cache
def roots_program(config: FrontDoor):
    """Our program for one case, with how far the stages of its steps are from roots of the equations for the field of
    another, or the same."""
    config = dataclasses.replace(
        config, derivative=None, batch=(), dense=True, adjoint=dfx.RecursiveCheckpointAdjoint()
    )

    def apart(case, of_field):
        sol = fuzz_front_door.call_of(config, case, pdx.diffeqsolve, terms_of, pack, event_of)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            direction = jnp.where(case["span"] > 0, 1, -1).astype(config.dtype)
            return fuzz_front_door.roots_apart(config, case, sol, vector_fields(config, of_field, direction))

    return jax.jit(apart)


@functools.cache
def program(config: Config):
    function = functools.partial(examine, config)
    for _ in config.batch:
        function = jax.vmap(function)
    return jax.jit(function)


def arrays(config: Config | FrontDoor, case: Case):
    """A case as arguments of the program."""
    number = lambda x: jnp.asarray(x, config.dtype)
    values = {k: number(v) for k, v in dataclasses.asdict(case).items() if not isinstance(v, tuple | dict)}
    if case.span == 0 and (config.controller == "to" or config.noise or config.derivative is not None):
        # Diffrax refuses times that do not increase, and an empty path.
        values["span"] = number(1.0)
    if isinstance(config, FrontDoor) and config.controller == "static":
        t0, t1 = fuzz_front_door.static_times(config)
        values |= {"t0": number(t0), "span": number(t1 - t0)}
    if isinstance(config, FrontDoor):
        values["root"] = number(1.0)
    if config.noise:
        values["span"] = jnp.abs(values["span"])
    weights = {name: number(weights_of(config, case).get(name, 0.0)) for name in WEIGHTS}
    ts, pulse = number(np.sort(case.ts)), number(np.sort(case.pulse))
    return values | {"weights": weights, "y0": number(np.resize(case.y0, config.size)), "ts": ts, "pulse": pulse}


def weights_of(config: Config | FrontDoor, case: Case) -> dict[str, float]:
    """The weights of the case. A term that the field does not have is replaced by one that it has."""
    if not config.names:
        return case.weights
    weights = {}
    for name, weight in case.weights.items():
        new = name if name in config.names else config.names[sorted(WEIGHTS).index(name) % len(config.names)]
        weights[new] = weight / WEIGHTS[name][-1] * WEIGHTS[new][-1]
    return weights


def random_names(rng) -> tuple[str, ...]:
    return tuple(sorted(rng.choice(sorted(WEIGHTS), 4, replace=False).tolist()))


def run_program(config: Config | FrontDoor, run, args: list) -> list[dict]:
    """What a program answers to each case."""
    if not config.batch:
        return [jax.tree.map(np.asarray, run(arg)) for arg in args]
    stack = lambda *x: jnp.stack(x).reshape(*config.batch, *x[0].shape)
    seen = jax.tree.map(np.asarray, run(jax.tree.map(stack, *args)))
    seen = {name: x.reshape(len(args), *x.shape[len(config.batch) :]) for name, x in seen.items()}
    return [{name: x[i] for name, x in seen.items()} for i in range(len(args))]


def _while_running(error: Exception) -> bool:
    return isinstance(error, eqx.EquinoxRuntimeError) or "Callback" in str(error) or "non-finite" in str(error)


def check_front_door(config: FrontDoor, cases: list[Case]) -> tuple[list[str], list[str]]:
    args, wrong, outcomes = [arrays(config, case) for case in cases], [], []
    for case, arg, seen in zip(cases, args, run_program(config, front_door_programs(config)[0], args)):
        some, outcome, want = hold_to_diffrax(config, arg, seen)
        numbers = [{k: v.tolist() for k, v in s.items()} for s in (seen, want)]
        wrong += [f"{what}: {config} {case} {numbers}" for what in some]
        outcomes += outcome
    return wrong, outcomes


def hold_to_diffrax(config: FrontDoor, arg, seen) -> tuple[list[str], list[str], dict]:
    """What is wrong with our answer `seen` to one case, the outcomes, and the answer of Diffrax."""
    theirs = front_door_programs(config)[1]
    answers = lambda args: [jax.tree.map(np.asarray, theirs(arg)) for arg in args]
    try:
        want, *shifted = answers([arg, *fuzz_front_door.shadows(config, arg)])
        other = answers(fuzz_front_door.with_other_roots(config, arg))
        wrong, outcome = fuzz_front_door.judge(config, arg, seen, want, shifted, other)
        if wrong:
            shifted += answers(fuzz_front_door.shadows(config, arg, fuzz_front_door.MORE_SHADOW_SIZES))
            wrong, outcome = fuzz_front_door.judge(config, arg, seen, want, shifted, other)
    except (eqx.EquinoxRuntimeError, jax.errors.JaxRuntimeError, ValueError) as error:
        if not _while_running(error):
            raise
        # Implicit solvers do, where a state is not finite.
        wrong, kind = check_roots(config, arg, seen), "front door: not compared, Diffrax raises an error"
        return wrong or [], [kind if wrong is None else f"{kind}, the stages of ours are roots"], {}
    # (The controller would reject the steps to most other roots.)
    if wrong and not config.adaptive and (roots := check_roots(config, arg, seen)) is not None and not roots:
        return (
            [],
            ["front door: compared with the equations of the steps, where Diffrax fails or has other roots"],
            want,
        )
    return wrong, outcome, want


def check_roots(config: FrontDoor, arg, seen) -> list[str] | None:
    """What is wrong with the stages of our implicit steps, and all that is made from them, without those of Diffrax. `None`
    if there are none that succeeded."""
    if not config.implicit or not bool(seen["windows"] & (seen["successful"] | seen["event_occurred"])):
        return None
    wrong = fuzz_front_door.wrong_roots(config, arg, jax.tree.map(np.asarray, roots_program(config)(arg, arg)), seen)
    if config.derivative is not None and config.dtype == jnp.float64 and not config.adaptive and not config.batch:
        # The derivative along a direction, by differences. (Terms that are not there are constants.)
        params = {"y0": arg["y0"], "weights": arg["weights"]}
        leaves, structure = jax.tree.flatten(params)
        parts = np.split(tangent_of(sum(leaf.size for leaf in leaves)), np.cumsum([leaf.size for leaf in leaves])[:-1])
        tangent = structure.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves)])
        tangent["weights"] = {k: np.where(arg["weights"][k] != 0, v, 0) for k, v in tangent["weights"].items()}
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(tangent)])
        derivative = np.sum(seen["derivative"] * (1 if config.derivative == "forward" else flat))
        moved = lambda h: arg | jax.tree.map(lambda x, v: x + h * jnp.asarray(v), params, tangent)
        loss = lambda h: float(front_door_programs(config)[0](moved(h))["loss"])
        by_difference, shorter = ((loss(h) - loss(-h)) / (2 * h) for h in (1e-6, 1e-7))
        # (They differ where there is no derivative, as at the root of zero.)
        differ = abs(by_difference - shorter) > 1e-2 * (1 + abs(by_difference))
        if not differ and not abs(derivative - by_difference) <= 1e-4 * (1 + abs(by_difference)):
            wrong.append(f"the derivative is {derivative}, by differences it is {by_difference}")
    return wrong


def check(config: Config | FrontDoor, cases: list[Case]) -> tuple[list[str], list[str]]:
    """Runs one case, or a batch of them. Returns what is wrong, and the outcomes."""
    if isinstance(config, FrontDoor):
        return check_front_door(config, cases)
    args = [arrays(config, case) for case in cases]
    seen = run_program(config, program(config), args)
    wrong, outcomes = [], []
    for case, s in zip(cases, seen):
        some, outcome = judge(config, s)
        wrong += [f"{what}: {config} {case} { {k: v.tolist() for k, v in s.items()} }" for what in some]
        outcomes += outcome
    return wrong, outcomes


def floats(low, high):
    return st.floats(low, high, allow_nan=False, allow_subnormal=False)


@st.composite
def cases(draw):
    """Random cases: up to three terms at a time, so that each comes to bear."""
    names = draw(st.lists(st.sampled_from(sorted(WEIGHTS)), min_size=1, max_size=3, unique=True))
    weights = {name: draw(st.sampled_from(WEIGHTS[name][1:])) * draw(floats(0.5, 1.5)) for name in names}
    rarely = lambda value: draw(value) if draw(st.integers(0, 5)) == 5 else float("inf")
    return Case(
        t0=draw(st.sampled_from([0.0, -1.0, 3.0, 100.0])),
        span=draw(st.sampled_from([1.0, 1.0, -1.0, 0.0])) * draw(st.sampled_from([0.01, 1.0, 5.0, 20.0]) | floats(0.1, 20)),
        windows=draw(st.sampled_from([1.0, 1.0, 2.0, 2.7, 5.0, 0.6])),
        rtol=draw(st.sampled_from([1e-8, 1e-8, 1e-5, 1e-12])),
        y0=tuple(draw(st.sampled_from([1.0, -1.0, 0.0, 1e-3, 30.0])) * draw(floats(0.3, 1.7)) for _ in range(3)),
        weights=weights,
        nan_t=rarely(floats(-2, 10)),
        nan_y=rarely(floats(0.5, 3)),
        inf_y=rarely(floats(0.5, 3)),
        ts=tuple(draw(st.lists(st.sampled_from([0.0, 1.0, 0.5]) | floats(0, 1), min_size=NUM_TS, max_size=NUM_TS))),
        pulse=(draw(floats(0, 1)), draw(floats(0, 1))),
        level=draw(floats(-1.5, 1.5)),
        key=float(draw(st.integers(0, 999))),
        tolerance=draw(st.sampled_from([1e-3, 1e-4, 1e-6])),
    )  # fmt: skip


EXPLICIT = (dfx.Heun(), dfx.Bosh3(), dfx.Tsit5(), dfx.Dopri5(), dfx.Euler(), dfx.Dopri8())
STATEFUL = (dfx.LeapfrogMidpoint(), dfx.ReversibleHeun())
DIAGONALLY_IMPLICIT = (dfx.ImplicitEuler(), dfx.Kvaerno3(), dfx.Kvaerno4(), dfx.Kvaerno5())
STOCHASTIC = (
    *(dfx.Euler(), dfx.EulerHeun(), dfx.ItoMilstein(), dfx.StratonovichMilstein(), dfx.SlowRK(), dfx.SPaRK()),
    *(dfx.GeneralShARK(), dfx.ShARK(), dfx.SRA1(), dfx.SEA()),
)
ADJOINTS = {
    "reverse": (dfx.RecursiveCheckpointAdjoint(), dfx.DirectAdjoint(), pdx.ParallelAdjoint(), pdx.ParallelAdjoint()),
    "forward": (dfx.ForwardMode(), dfx.DirectAdjoint(), pdx.ParallelAdjoint(), pdx.ParallelAdjoint()),
}


FRONT_DOOR_ADJOINTS = {
    None: (dfx.RecursiveCheckpointAdjoint(),),
    "reverse": (dfx.RecursiveCheckpointAdjoint(), dfx.DirectAdjoint(), pdx.ParallelAdjoint()),
    "forward": (dfx.ForwardMode(), pdx.ParallelAdjoint()),
}
IMPLICIT_EXPLICIT_SOLVERS = tuple(cls() for cls in IMPLICIT_EXPLICIT)
# Where 64-bit numbers are on, parts of Diffrax promote: its search for the time of an event, interpolants, products.
PROMOTES = dfx.KenCarp3, dfx.KenCarp4, dfx.KenCarp5, dfx.ItoMilstein, dfx.StratonovichMilstein
WITH_ERROR_ESTIMATE = (dfx.ShARK(), dfx.SRA1(), dfx.SPaRK())


def random_config(number: int) -> Config | FrontDoor:
    """The configurations of the long run. Of nine, two use the front door, and one the defaults of `ParallelSolver`."""
    if number % 9 in (0, 3):
        return random_front_door(number)
    if number % 9 == 6:
        return random_default(number)
    return random_parallel(number)


def random_front_door(number: int) -> FrontDoor:
    rng = np.random.default_rng(number)
    pick = lambda *options: options[rng.integers(len(options))]
    kinds = EXPLICIT, EXPLICIT, STATEFUL, DIAGONALLY_IMPLICIT, IMPLICIT_EXPLICIT_SOLVERS, STOCHASTIC
    solver, derivative = pick(*pick(*kinds)), pick(None, "reverse", "reverse", "forward")
    if derivative != "forward" and pick(*[False] * 7, True):
        # (Diffrax's forward mode misses an attribute of it.)
        solver = dfx.HalfSolver(dfx.Heun())
    noise = solver in STOCHASTIC and (solver not in EXPLICIT or pick(True, False))
    adaptive = not isinstance(solver, (dfx.Euler, dfx.LeapfrogMidpoint)) and (
        not noise or solver in WITH_ERROR_ESTIMATE
    )
    event = None if noise else pick(None, None, None, "up", "down", "any", "bool")
    container = pick("array", "array", "dict", "complex")
    if noise or solver in IMPLICIT_EXPLICIT_SOLVERS or isinstance(solver, dfx.AbstractImplicitSolver):
        container = "array"
    only_double = event is not None or noise or container == "complex" or isinstance(solver, PROMOTES)
    return FrontDoor(
        solver=solver,
        num_steps=int(pick(1, 7, 40, 100)),
        controller=pick("constant", "static", "to", *(("pid", "pid", "pid", "clip") if adaptive else ())),
        first_step=pick(True, False),
        backward=not noise and pick(True, False),
        dtype=jnp.float64 if only_double else pick(jnp.float64, jnp.float32),
        # (States of more than 8 numbers are not made in scalars.)
        size={"array": pick(3, 2, 1, 10), "dict": 3, "complex": 2}[container],
        # (Diffrax raises in the derivative of events of a batch in which one member fails.)
        batch=pick((), (), (), (4,)) if event is None or derivative is None else (),
        container=container,
        noise=noise,
        event=event,
        derivative=derivative,
        names=random_names(rng),
        adjoint=pick(*FRONT_DOOR_ADJOINTS[derivative]),
        dense=event is None and derivative is None and pick(False, True),
    )


def random_default(number: int) -> Config:
    """`ParallelSolver(solver)`, with windows of the default's own choice or of a given size."""
    rng = np.random.default_rng(number)
    pick = lambda *options: options[rng.integers(len(options))]
    kinds = EXPLICIT, EXPLICIT, STATEFUL, DIAGONALLY_IMPLICIT, IMPLICIT_EXPLICIT_SOLVERS, STOCHASTIC
    solver = pick(*pick(*kinds))
    noise = solver in STOCHASTIC and (solver not in EXPLICIT or pick(True, False))
    adaptive = not noise and not isinstance(solver, (dfx.Euler, dfx.LeapfrogMidpoint))
    derivative, event = pick(None, "reverse", "forward"), pick(None, None, None, "up", "down", "any", "bool")
    only_double = event is not None or isinstance(solver, PROMOTES)
    return Config(
        solver=solver,
        num_steps=pick(None, None, 7, 40),
        policy=pdx.policies.CostPolicy(),
        controller=pick("constant", "windows", "to", *(("pid", "pid", "pid", "clip") if adaptive else ())),
        dtype=jnp.float64 if only_double else pick(jnp.float64, jnp.float32),
        size=pick(3, 2, 1),
        batch=pick((), (), (4,)),
        noise=noise,
        event=event,
        derivative=derivative,
        names=random_names(rng),
        adjoint=pdx.ParallelAdjoint() if event is not None else pick(*ADJOINTS[derivative or "reverse"]),
    )


def random_parallel(number: int) -> Config:
    """The policies, root finders and predictors of steps in parallel."""
    rng = np.random.default_rng(number)
    pick = lambda *options: options[rng.integers(len(options))]
    implicit_explicit = IMPLICIT_EXPLICIT_SOLVERS
    kinds = EXPLICIT, EXPLICIT, STATEFUL, DIAGONALLY_IMPLICIT, DIAGONALLY_IMPLICIT, implicit_explicit, STOCHASTIC
    solver = pick(*pick(*kinds))
    noise = solver in STOCHASTIC and (solver not in EXPLICIT or pick(True, False))
    runge_kutta = (*EXPLICIT, *DIAGONALLY_IMPLICIT, *implicit_explicit)
    adaptive = not noise and (solver in runge_kutta or isinstance(solver, dfx.ReversibleHeun))
    adaptive = adaptive and not isinstance(solver, dfx.Euler)
    controllers = ("constant", "windows", "to", *(("pid", "clip") if adaptive else ()))
    predictors = (pdx.ConstantPredictor(), pdx.CoarsePredictor(), pdx.CoarsePredictor(num_steps=8))
    if not noise and solver in runge_kutta and not isinstance(solver, dfx.Euler):
        predictors = (*predictors, pdx.AdaptivePredictor(), pdx.AdaptivePredictor())
    size, container = pick((3, "array"), (3, "array"), (1, "array"), (2, "array"), (3, "dict"), (2, "complex"))
    if noise or solver in implicit_explicit:
        container = "array"
    derivative = pick(None, "reverse", "forward")
    event = pick(None, None, "up", "down", "any", "bool")
    only_double = event is not None or isinstance(solver, PROMOTES)
    if event is not None:
        adjoint = pdx.ParallelAdjoint()
    else:
        adjoint = pick(*ADJOINTS["reverse" if derivative is None else derivative])
    return Config(
        solver=solver,
        num_steps=int(pick(1, 7, 40, 40, 150)),
        root_finder=pick("newton", "newton", "newton", *ROOT_FINDERS),
        predictor=pick(*predictors),
        policy=pick(
            pdx.AdaptivePolicy(),
            pdx.AdaptivePolicy(min_steps=4),
            pdx.policies.ParallelThenSequential(),
            pdx.policies.ParallelOnly(),
        ),
        controller=pick(*controllers),
        dtype=pick(jnp.float64, jnp.float64, jnp.float64 if only_double else jnp.float32),
        size=size,
        batch=pick((), (), (4,), (2, 3)),
        container=container,
        noise=noise,
        event=event,
        derivative=derivative,
        names=random_names(rng),
        adjoint=adjoint,
    )


def run(config: Config | FrontDoor, max_examples: int, number: int, report, count):
    """`max_examples` cases of one configuration. Everything wrong is handed to `report`, each outcome to `count`."""
    batch = int(np.prod(config.batch))

    @seed(number)
    @settings(
        max_examples=-(-max_examples // batch), deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(cases(), min_size=batch, max_size=batch))
    def one(batch_of_cases):
        try:
            wrong, outcomes = check(config, batch_of_cases)
        except (eqx.EquinoxRuntimeError, jax.errors.JaxRuntimeError, ValueError) as error:
            # Others are errors in the program itself.
            if not _while_running(error):
                raise
            wrong, outcomes = [f"crash: {str(error)[-1500:]}: {config} {batch_of_cases}"], ["values: crash"]
        for what in wrong:
            report(what)
        for outcome in outcomes:
            count(outcome)

    one()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", type=int, nargs="?", default=2000)
    parser.add_argument("--start", type=int, default=0, help="number of the first configuration")
    parser.add_argument("--stride", type=int, default=1, help="every so many configurations: for several processes")
    parser.add_argument("--per-config", type=int, default=40)
    parser.add_argument("--only", choices=("front door", "default", "parallel"), help="one kind of configurations")
    parser.add_argument(
        "--fast", action="store_true", help="compile with the flags of the suite, which round otherwise"
    )
    options = parser.parse_args()
    if options.fast:
        importlib.import_module("tests.conftest")
    draw = {"front door": random_front_door, "default": random_default, "parallel": random_parallel}
    draw = draw.get(options.only, random_config)
    # Our solves are traced under strict settings, always.
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    warnings.filterwarnings("ignore", message="Complex dtype support in Diffrax")
    found, tally, shown, number = [], collections.Counter(), 0, options.start
    began = time.time()
    made = lambda: sum(count for outcome, count in tally.items() if not outcome.startswith(("event", "derivative")))
    while made() < options.cases:
        config = draw(number)
        try:
            run(config, options.per_config, number, found.append, lambda outcome: tally.update([outcome]))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found.append(f"crash: {type(error).__name__}: {str(error)[:1000]}: {where}: {config}")
            tally["crash"] += options.per_config
        print(f"{made()} cases, configuration {number}, {time.time() - began:.0f} s, {len(found)} found", flush=True)
        for wrong in found[shown:]:
            print(f"  {number}: {wrong}", flush=True)
        shown, number = len(found), number + options.stride
        program.cache_clear()
        front_door_programs.cache_clear()
        roots_program.cache_clear()
        jax.clear_caches()
    for outcome, count in sorted(tally.items()):
        print(f"{count:6} {outcome}")
    sys.exit(len(found) > 0)


if __name__ == "__main__":
    main()
