"""The fuzzer's cases of the front door: `parallel_diffrax.diffeqsolve` against `diffrax.diffeqsolve`, the same call twice.

Values, times, counts of steps, results, events and derivatives are compared. How far they are determined is measured by
Diffrax itself, on inputs that differ by rounding; and where windows end between the steps of Diffrax (adaptive steps with an
event), on other tolerances.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

from .fuzz_reference import tangent_of


MAX_STEPS = {"constant": 128, "static": 4096, "to": 128}
ADAPTIVE_MAX_STEPS = 256
ADAPTIVE = ("pid", "clip")
COUNTS = ("num_steps", "num_accepted_steps", "num_rejected_steps")
RESULTS = ("successful", "event_occurred", "max_steps_reached")
# Inputs that differ by rounding, and other tolerances.
NUM_SHADOWS, SHADOW_SIZE, OTHER_TOLERANCES = 3, 32, (0.3, 0.1)


@dataclasses.dataclass(frozen=True)
class FrontDoor:
    """All that a program is compiled for."""

    solver: dfx.AbstractSolver = dfx.Tsit5()
    # Steps in the span, if they are of known lengths.
    num_steps: int = 40
    # "static" is "constant", with times that are known when the program is traced.
    controller: str = "constant"
    # A first step is given, or chosen by the controller.
    first_step: bool = False
    backward: bool = False
    dtype: Any = jnp.float64
    size: int = 3
    batch: tuple[int, ...] = ()
    container: str = "array"
    noise: bool = False
    event: str | None = None
    derivative: str | None = None
    adjoint: dfx.AbstractAdjoint = dfx.RecursiveCheckpointAdjoint()
    dense: bool = False
    names: tuple[str, ...] = ()

    @property
    def adaptive(self) -> bool:
        return self.controller in ADAPTIVE

    @property
    def implicit(self) -> bool:
        return isinstance(self.solver, dfx.AbstractImplicitSolver)

    @property
    def ends_between(self) -> bool:
        """Whether windows end between the steps of Diffrax."""
        return self.adaptive and self.event is not None


def call_of(config: FrontDoor, case, solve: Callable, terms: Callable, pack: Callable, event_of: Callable):
    """The one call, with either function."""
    t0, t1 = case["t0"], case["t0"] + case["span"]
    dt0, controller, solver = case["span"] / case["windows"] / config.num_steps, dfx.ConstantStepSize(), config.solver
    if config.controller == "static":
        t0, t1 = static_times(config)
        dt0 = (t1 - t0) / (config.num_steps - 0.3)
    elif config.controller == "to":
        share = np.linspace(0.0, 1.0, config.num_steps + 1) ** 1.5
        dt0, controller = None, dfx.StepTo(t0 + case["span"] * jnp.asarray(share, config.dtype))
        t1 = controller.ts[-1]
    elif config.adaptive:
        dt0 = 0.01 * case["span"] if config.first_step else None
        controller = dfx.PIDController(rtol=case["tolerance"], atol=0.01 * case["tolerance"])
        if config.controller == "clip":
            jump_ts = t0 + case["span"] * case["pulse"]
            controller = dfx.ClipStepSizeController(controller, jump_ts=jump_ts)
    if config.implicit and not config.adaptive:
        solver = eqx.tree_at(lambda s: s.root_finder, solver, optx.Newton(rtol=1e-10, atol=1e-10))
    subs = {"t1": dfx.SubSaveAt(t1=True)}
    if config.event is None:
        subs["ts"] = dfx.SubSaveAt(ts=t0 + (t1 - t0) * case["ts"])
    return solve(
        terms(config, case, container=config.container), solver, t0, t1, dt0, pack(case["y0"], config.container),
        saveat=dfx.SaveAt(subs=subs, dense=config.dense), stepsize_controller=controller, adjoint=config.adjoint,
        event=None if config.event is None else event_of(config, case), throw=False,
        max_steps=MAX_STEPS.get(config.controller, ADAPTIVE_MAX_STEPS),
    )  # fmt: skip


def static_times(config: FrontDoor) -> tuple[float, float]:
    return (2.0, -0.5) if config.backward else (0.0, 2.5)


def answer(config: FrontDoor, case, solve, terms, pack, unpack, event_of):
    """Everything that is compared, of one call."""
    params = {"y0": case["y0"], "weights": case["weights"]}
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.normal(size=shape), config.dtype) for shape in ((config.size,), (9, config.size), ())]

    def loss(params):
        sol = call_of(config, case | params, solve, terms, pack, event_of)
        final = unpack(jax.tree.map(lambda x: x[0], sol.ys["t1"]), config.container)
        seen = {"final": final, "t": sol.ts["t1"][0]}
        if config.event is None:
            seen["outputs"] = jax.vmap(lambda y: unpack(y, config.container))(sol.ys["ts"])
            seen["ts"] = sol.ts["ts"]
        # The loss masks what is not finite: the derivative of a failed solve must be NaN all the same. (In forward mode, the
        # tangents of what is masked never arrive.)
        finite = lambda x: x if config.derivative == "forward" else jnp.where(jnp.isfinite(x), x, 0)
        total = jnp.sum(weights[0] * finite(final)) + weights[2] * finite(seen["t"]).astype(config.dtype)
        if config.event is None:
            total = total + jnp.sum(weights[1] * finite(seen["outputs"]))
        if config.dense:
            sampled = jax.vmap(sol.evaluate)(
                sol.ts["t1"][0] * 0.3 + 0.7 * jnp.where(jnp.isfinite(sol.ts["ts"]), sol.ts["ts"], sol.t0)
            )
            seen["dense"] = jax.vmap(lambda y: unpack(y, config.container))(sampled)
            total = total + jnp.sum(weights[1] * finite(seen["dense"]))
        return total, (seen, sol)

    if config.derivative is None:
        _, (seen, sol) = loss(params)
    else:
        leaves, structure = jax.tree.flatten(params)
        if config.derivative == "forward":
            flat = jnp.asarray(tangent_of(sum(leaf.size for leaf in leaves)), config.dtype)
            parts = jnp.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
            tangent = structure.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves)])
            (_, (seen, sol)), (derivative, _) = eqx.filter_jvp(loss, (params,), (tangent,))
        else:
            (_, (seen, sol)), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(params)
            derivative = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
        seen["derivative"] = derivative
    seen |= {name: sol.stats[name] for name in COUNTS}
    seen |= {name: sol.result == getattr(dfx.RESULTS, name) for name in RESULTS}
    # Whether we solved it, or handed it to Diffrax.
    seen["windows"] = jnp.array("windows" in sol.stats)
    if "windows" in sol.stats:
        statistics = sol.stats["windows"]
        seen["made"] = statistics.parallel_steps + statistics.sequential_steps
    return seen


def shadows(config: FrontDoor, args) -> list:
    """The arguments of the same case with other rounding, then, if needed, with other tolerances."""
    rng, eps = np.random.default_rng(3), float(jnp.finfo(config.dtype).eps)
    disturb = lambda x: x * jnp.asarray(1 + SHADOW_SIZE * eps * rng.choice([-1.0, 1.0], np.shape(x)), config.dtype)
    disturbed = [
        args | {"y0": disturb(args["y0"]), "weights": jax.tree.map(disturb, args["weights"]), "span": args["span"]}
        | {"t0": args["t0"] * jnp.asarray(1 + 2 * eps * rng.choice([-1, 1]), config.dtype)}
        for _ in range(NUM_SHADOWS)
    ]  # fmt: skip
    if config.ends_between:
        disturbed += [args | {"tolerance": args["tolerance"] * factor} for factor in OTHER_TOLERANCES]
    return disturbed


# Both solutions may be infinite in the same place.
@np.errstate(invalid="ignore")
def judge(config: FrontDoor, args, ours, theirs: list[dict]) -> tuple[list[str], list[str]]:
    """What is wrong, and what could be compared, or why it could not. `theirs` are the answers of Diffrax to the case and to
    its shadows."""
    wrong, want = [], theirs[0]
    # Diffrax takes a solution that is not finite for a success.
    finite = lambda seen: all(np.all(np.isfinite(seen[k])) for k in ("final", "outputs") if k in seen)
    ended = lambda seen: bool(seen["successful"] | seen["event_occurred"])
    shifted, other = theirs[1 : 1 + NUM_SHADOWS], theirs[1 + NUM_SHADOWS :]
    same = lambda a, b, names: all(np.array_equal(a[name], b[name]) for name in names)
    names = RESULTS if config.ends_between else (*COUNTS, *RESULTS)
    steps_determined = all(same(want, seen, names) and finite(seen) == finite(want) for seen in (*shifted, *other))
    handed = "" if bool(ours["windows"]) else " (handed to Diffrax)"
    kind = "front door, " + ("adaptive" if config.adaptive else "constant") + handed

    if bool(ours["successful"]) and not finite(ours) and not handed:
        wrong.append("success, but not finite")
    if config.ends_between and bool(ours["max_steps_reached"]) and bool(ended(want)):
        # Windows that are tried again use up the steps, and some solves need nearly all.
        return wrong, [f"{kind}: out of steps where Diffrax succeeds"]
    if finite(want) and ended(want) and not ended(ours):
        if steps_determined:
            wrong.append("a failure where Diffrax succeeds")
        return wrong, [f"{kind}: reported as failed, where the steps of Diffrax are not determined"]
    outcome = []
    if ended(want) and finite(want) and ended(ours):
        outcome.append(f"{kind}: compared")
    elif config.ends_between and bool(want["max_steps_reached"]):
        # `max_steps` windows may have more steps than `max_steps`.
        return wrong, [f"{kind}: not compared, too few steps"]
    elif config.adaptive and bool(ours["max_steps_reached"]) and int(ours["num_accepted_steps"]) == 0:
        # Outputs at the initial time are NaN, where Diffrax has not saved them yet.
        return wrong, [f"{kind}: no step accepted"]
    elif bool(ours["max_steps_reached"]) and bool(want["max_steps_reached"]):
        outcome.append(f"{kind}: compared up to the end of `max_steps`")
    elif ended(ours):
        # An adaptive solve of ours shortens a step that overflows, where Diffrax repeats it for ever.
        # Its Newton iterations for implicit steps diverge where ours need not.
        if not handed and steps_determined and not config.adaptive and not config.implicit:
            wrong.append("a success where the solve of Diffrax is not finite, or failed")
        return wrong, [f"{kind}: a success where Diffrax fails or is not finite"]
    else:
        if config.derivative is not None and not handed and not bool(ours["max_steps_reached"]):
            derivative = np.atleast_1d(ours["derivative"])
            head = derivative if config.derivative == "forward" else derivative[-config.size :]
            if not np.all(np.isnan(head)):
                wrong.append("a failed solve has a derivative that is not NaN")
        return wrong, [f"{kind}: reported as failed where Diffrax fails or is not finite"]

    if steps_determined and not same(ours, want, names):
        wrong.append("other steps than those of Diffrax")
    eps = float(jnp.finfo(config.dtype).eps)
    size = max(
        float(np.max(np.abs(x), initial=0, where=np.isfinite(x)))
        for x in (want["final"], args["y0"], want.get("outputs", np.zeros(1)))
    )
    # Implicit stages are found to the tolerance of the root finder, by two ways.
    accuracy = 1e3 * eps * (size + 1e-3)
    if config.implicit:
        accuracy += 1e-7 * (1 + size) if not config.adaptive else float(args["tolerance"]) * (0.01 + size)
    outcome += [f"event: {'compared' if steps_determined else 'not determined'}"] if config.event else []
    for name in ("ts", "t", "final", "outputs", "dense", "derivative"):
        if name not in want:
            continue
        got, value = np.atleast_1d(ours[name]), np.atleast_1d(want[name])
        spread = np.max([np.abs(np.atleast_1d(seen[name]) - value) for seen in shifted], axis=0)
        room = 100 * spread + accuracy
        if config.ends_between:
            room = room + 10 * np.max([np.abs(np.atleast_1d(seen[name]) - value) for seen in other], axis=0) + 1e-9
        if name in ("t", "ts"):
            room = room + 1e2 * eps * np.abs(value)
        if name == "derivative":
            room = (
                room
                + 1e3 * eps * (np.abs(value) + 1)
                + (1e3 * accuracy * (1 + np.abs(value)) if config.implicit else 0)
            )
        if name != "derivative" and steps_determined and not np.array_equal(np.isfinite(got), np.isfinite(value)):
            wrong.append(f"{name} is finite elsewhere than with Diffrax")
        determined = np.isfinite(room) & np.isfinite(value)
        if name == "derivative" and bool(ours["max_steps_reached"]) and not handed and config.adaptive:
            # The end of an adaptive solve that ran out of steps has no derivative, and says so.
            determined = determined & ~np.isnan(got)
        if name == "derivative":
            outcome.append(f"derivative: {'compared' if np.any(determined) else 'not determined'}")
        apart = np.abs(got - value) / np.where(determined, room, 1)
        bad = determined & ~(apart <= 1)
        if np.any(bad):
            wrong.append(f"{name} is apart from Diffrax by {np.max(np.where(bad, apart, 0))} times what is allowed")
    return wrong, outcome
