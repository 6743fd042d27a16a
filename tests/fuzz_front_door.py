"""The fuzzer's cases of the front door: `parallel_diffrax.diffeqsolve` against `diffrax.diffeqsolve`, the same call twice.

Values, times, counts of steps, results, events and derivatives are compared. How far they are determined is measured by
Diffrax itself, on inputs that differ by rounding, and with root finders of smaller tolerances. Where Diffrax would repeat a
step that is infinite for ever, its controller is told that the error is infinite, which is what ours is told.

An equation of an implicit step may have several roots. Where ours is not that of Diffrax, the equations of all of our steps
are checked instead.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

import parallel_diffrax as pdx

from .fuzz_reference import lower_matrix, tableaus_of, tangent_of


MAX_STEPS = {"constant": 128, "static": 4096, "to": 128}
ADAPTIVE_MAX_STEPS = 256
ADAPTIVE = ("pid", "clip")
COUNTS = ("num_steps", "num_accepted_steps", "num_rejected_steps")
RESULTS = ("successful", "event_occurred", "max_steps_reached")
# Inputs that differ by rounding: so many, by so many units in the last place; and where the first ones do not explain a
# difference, more of them.
SHADOW_SIZES = (32, 32, 32)
MORE_SHADOW_SIZES = (4, 8, 16, 64, 64, 128, 128, 256)
# Tolerances of the root finder of implicit steps, relative to those of Diffrax. (As small as rounding allows: with others it
# may stop after as many iterations.)
ROOT_TOLERANCES = {jnp.float64: (1e-2, 1e-4), jnp.float32: (0.1,)}


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


class InfiniteStepsRejected(dfx.AbstractAdaptiveStepSizeController):
    """A `controller` to which a step that is infinite has an infinite error. (Its error relative to itself would be NaN,
    with which no `PIDController` goes on.) Its state tells whether there was one."""

    controller: dfx.PIDController

    @property
    def rtol(self):
        return self.controller.rtol

    @property
    def atol(self):
        return self.controller.atol

    @property
    def norm(self):
        return self.controller.norm

    def wrap(self, direction):
        return InfiniteStepsRejected(self.controller.wrap(direction))

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        t1, state = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
        return t1, (state, jnp.array(False))

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state):
        state, found = controller_state
        of_all = lambda test: jnp.all(jnp.array([jnp.all(test(y)) for y in jax.tree.leaves(y1_candidate)]))
        infinite = ~of_all(lambda y: ~jnp.isinf(y))
        y1 = jax.tree.map(lambda y, old: jnp.where(infinite, old, y), y1_candidate, y0)
        y_error = jax.tree.map(lambda x: jnp.where(infinite, jnp.inf, x), y_error)
        *step, state, result = self.controller.adapt_step_size(t0, t1, y0, y1, args, y_error, error_order, state)
        return *step, (state, found | infinite), result


def call_of(config: FrontDoor, case, solve: Callable, terms: Callable, pack: Callable, event_of: Callable):
    """The one call, with either function."""
    ours, saves = solve is not dfx.diffeqsolve, {"dense": config.dense}
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
        if config.implicit and not ours:
            tolerances = case["root"] * controller.rtol, case["root"] * controller.atol, controller.norm
            names = operator.attrgetter("root_finder.rtol", "root_finder.atol", "root_finder.norm")
            solver = eqx.tree_at(names, solver, tolerances)
        if not ours:
            controller, saves["controller_state"] = InfiniteStepsRejected(controller), True
        if config.controller == "clip":
            jump_ts = t0 + case["span"] * case["pulse"]
            controller = dfx.ClipStepSizeController(controller, jump_ts=jump_ts)
    if config.implicit and not config.adaptive:
        tolerance = root_tolerance(config)
        solver = eqx.tree_at(lambda s: s.root_finder, solver, optx.Newton(rtol=tolerance, atol=tolerance))
    subs = {"t1": dfx.SubSaveAt(t1=True)}
    if config.event is None:
        subs["ts"] = dfx.SubSaveAt(ts=t0 + (t1 - t0) * case["ts"])
    return solve(
        terms(config, case, container=config.container), solver, t0, t1, dt0, pack(case["y0"], config.container),
        saveat=dfx.SaveAt(subs=subs, **saves), stepsize_controller=controller, adjoint=adjoint_of(config, ours),
        event=None if config.event is None else event_of(config, case), throw=False,
        max_steps=MAX_STEPS.get(config.controller, ADAPTIVE_MAX_STEPS),
    )  # fmt: skip


def root_tolerance(config: FrontDoor) -> float:
    """Of the root finder of constant implicit steps: one that rounding lets it reach."""
    return 1e-10 if config.dtype == jnp.float64 else 1e-5


def adjoint_of(config: FrontDoor, ours: bool) -> dfx.AbstractAdjoint:
    # (Diffrax's `DirectAdjoint` misses an attribute of `HalfSolver`.)
    missing = isinstance(config.solver, dfx.HalfSolver) and isinstance(config.adjoint, dfx.DirectAdjoint)
    if ours or not (missing or isinstance(config.adjoint, pdx.ParallelAdjoint)):
        return config.adjoint
    return dfx.ForwardMode() if config.derivative == "forward" else dfx.RecursiveCheckpointAdjoint()


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
        return total, (seen | {"loss": total}, sol)

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
    if sol.controller_state is not None:
        state = sol.controller_state.inner_state if config.controller == "clip" else sol.controller_state
        seen["infinite_step"] = state[1]
    # Whether we solved it, or handed it to Diffrax.
    seen["windows"] = jnp.array("windows" in sol.stats)
    if "windows" in sol.stats:
        statistics = sol.stats["windows"]
        seen["made"] = statistics.parallel_steps + statistics.sequential_steps
    return seen


def shadows(config: FrontDoor, args, sizes=SHADOW_SIZES) -> list:
    """The arguments of the same case with other rounding."""
    rng, eps = np.random.default_rng(len(sizes)), float(jnp.finfo(config.dtype).eps)

    def disturbed(size: int):
        factor = lambda x, size: jnp.asarray(1 + size * eps * rng.choice([-1.0, 1.0], np.shape(x)), config.dtype)
        disturb = lambda x: x * factor(x, size)
        new = {name: jax.tree.map(disturb, args[name]) for name in ("y0", "weights", "tolerance")}
        return args | new | {"t0": args["t0"] * factor(args["t0"], 2)}

    return [disturbed(size) for size in sizes]


def with_other_roots(config: FrontDoor, args) -> list:
    """The arguments of the same case with other tolerances of the root finder."""
    if not (config.implicit and config.adaptive):
        return []
    return [args | {"root": jnp.asarray(factor, config.dtype)} for factor in ROOT_TOLERANCES[config.dtype]]


def judge(config: FrontDoor, args, ours, want, shifted: list, other: list) -> tuple[list[str], list[str]]:
    """What is wrong, and what could be compared, or why it could not. `want` is the answer of Diffrax to the case, `shifted`
    are those to its shadows, and `other` those with other tolerances of the root finder."""
    wrong = []
    # Diffrax takes a solution that is not finite for a success.
    finite = lambda seen: all(np.all(np.isfinite(seen[k])) for k in ("final", "outputs") if k in seen)
    ended = lambda seen: bool(seen["successful"] | seen["event_occurred"])
    same = lambda a, b: all(np.array_equal(a[name], b[name]) for name in (*COUNTS, *RESULTS))
    steps_determined = all(same(want, seen) and finite(seen) == finite(want) for seen in shifted)
    is_ours = bool(ours["windows"])
    kind = (
        "front door, " + ("adaptive" if config.adaptive else "constant") + ("" if is_ours else " (handed to Diffrax)")
    )
    if bool(want.get("infinite_step", False)):
        if not is_ours:
            wrong += ["a success where Diffrax repeats a step for ever"] if ended(ours) else []
            return wrong, [f"{kind}: not compared, Diffrax repeats an infinite step for ever"]
        kind += ", steps that Diffrax would repeat for ever"
    undetermined = ", where the steps of Diffrax are not determined"

    if bool(ours["successful"]) and not finite(ours) and is_ours:
        wrong.append("success, but not finite")
    if finite(want) and ended(want) and not ended(ours):
        if not steps_determined:
            return wrong, [f"{kind}: reported as failed{undetermined}"]
        if config.implicit and not config.adaptive and config.event is not None:
            # The stages of a long step may have several roots, and the search for the event fails in the step of another.
            return wrong, [f"{kind}: reported as failed, with an event in a step of several roots"]
        return [*wrong, "a failure where Diffrax succeeds"], [f"{kind}: reported as failed"]
    outcome = []
    if ended(want) and finite(want) and ended(ours):
        outcome.append(f"{kind}: compared")
    elif bool(ours["max_steps_reached"]) and bool(want["max_steps_reached"]):
        outcome.append(f"{kind}: compared up to the end of `max_steps`")
    elif ended(ours):
        if not steps_determined:
            return wrong, [f"{kind}: a success{undetermined}"]
        if is_ours:
            wrong.append("a success where the solve of Diffrax is not finite, or failed")
        return wrong, [f"{kind}: a success where Diffrax fails or is not finite"]
    else:
        if config.derivative is not None and is_ours and not bool(ours["max_steps_reached"]):
            derivative = np.atleast_1d(ours["derivative"])
            head = derivative if config.derivative == "forward" else derivative[-config.size :]
            if not np.all(np.isnan(head)):
                wrong.append("a failed solve has a derivative that is not NaN")
        return wrong, [f"{kind}: reported as failed where Diffrax fails or is not finite"]

    if config.event:
        outcome.append(f"event: {'compared' if steps_determined else 'not determined'}")
    if steps_determined and not same(ours, want):
        wrong.append("other steps than those of Diffrax")
    for name in ("ts", "t", "final", "outputs", "dense", "derivative"):
        if name not in want:
            continue
        # Where there are no steps, ours is NaN: dense output, and what Diffrax takes from it if an event occurs elsewhere in
        # a batch.
        from_dense_output = name == "dense" or (name == "final" and config.event is not None and len(config.batch) > 0)
        if from_dense_output and int(want["num_accepted_steps"]) == 0 and np.all(np.isnan(ours[name])):
            outcome.append(f"{kind}: not compared, no step was accepted and dense output is NaN")
            continue
        some, determined = _apart(config, args, name, ours, want, shifted, other, steps_determined)
        wrong += some
        if name == "derivative":
            outcome.append(f"derivative: {'compared' if determined else 'not determined'}")
    return wrong, outcome


# Both solutions may be infinite in the same place.
@np.errstate(invalid="ignore", over="ignore")
def _apart(config: FrontDoor, args, name: str, ours, want, shifted, other, steps_determined) -> tuple[list[str], bool]:
    """Where one array of the answer is apart from Diffrax's, and whether any of it is determined."""
    eps = float(jnp.finfo(config.dtype).eps)
    size = max(
        float(np.max(np.abs(x), initial=0, where=np.isfinite(x)))
        for x in (want["final"], args["y0"], want.get("outputs", np.zeros(1)))
    )
    got, value = np.atleast_1d(ours[name]), np.atleast_1d(want[name])
    # A larger disturbance counts for as much less.
    sizes = np.maximum((*SHADOW_SIZES, *MORE_SHADOW_SIZES)[: len(shifted)], SHADOW_SIZES[0]) / SHADOW_SIZES[0]
    apart_by = lambda seen: np.abs(np.atleast_1d(seen[name]) - value)
    spread = np.max([apart_by(seen) / size for seen, size in zip(shifted, sizes)], axis=0)
    other_spread = np.max([apart_by(seen) for seen in other], axis=0) if other else 0
    # Implicit stages of constant steps are found to the tolerance of the root finder, by two ways.
    accuracy = 1e3 * eps * (size + 1e-3) + (
        1e3 * root_tolerance(config) * (1 + size) if config.implicit and not config.adaptive else 0
    )
    room = 30 * spread + 10 * other_spread + accuracy
    t0, span = float(args["t0"]), abs(float(args["span"]))
    if config.noise:
        # The times of steps are rounded, and a path is steep between its nodes, 1000 of them, and steeper near one.
        room = room + 30 * eps * (abs(t0) + span) * np.sqrt(1e3 / span)
    if name in ("t", "ts"):
        room = room + 1e2 * eps * np.abs(value)
    if name in ("outputs", "dense"):
        # The times of outputs are rounded. (The largest slope is a few times that of the whole.)
        rise = np.ptp(np.concatenate([x[np.isfinite(x)] for x in (value, want["final"], args["y0"])]))
        room = room + 30 * eps * (abs(t0) + span) * rise / max(span, eps)
    if name == "derivative":
        room = room + 1e3 * eps * (np.abs(value) + 1) + (1e3 * accuracy * (1 + np.abs(value)) if config.implicit else 0)
    wrong = []
    if name != "derivative" and steps_determined and not np.array_equal(np.isfinite(got), np.isfinite(value)):
        wrong.append(f"{name} is finite elsewhere than with Diffrax")
    determined = np.isfinite(room) & np.isfinite(value)
    if name == "derivative" and not np.all(np.isfinite(value)):
        # A part of it is infinite, as at the root of zero. Zero times infinity is NaN in another order of operations.
        determined = determined & ~np.isnan(got)
    apart = np.abs(got - value) / np.where(determined, room, 1)
    bad = determined & ~(apart <= 1)
    if np.any(bad):
        wrong.append(f"{name} is apart from Diffrax by {np.max(np.where(bad, apart, 0))} times what is allowed")
    return wrong, bool(np.any(determined))


def wrong_roots(config: FrontDoor, args, roots: dict[str, Any], seen) -> list[str]:
    """What is wrong with the steps of an answer of ours, as `roots_apart` tells: whether their stages are roots of their
    equations, each step begins where the one before ends, and all that was `seen` is of these steps."""
    wrong, eps = [], float(jnp.finfo(config.dtype).eps)
    # The stages of adaptive steps are found anew for dense output, to the tolerance of the controller.
    tolerance = float(args["tolerance"]) if config.adaptive else 1e5 * eps
    if not (roots["apart"] <= 1 and roots["gap"] <= tolerance and roots["start"] == 0):
        wrong.append("the stages of a step are not roots of its equations")
    if any(roots[name] != seen[name] for name in COUNTS):
        wrong.append("other steps with dense output than without")
    for name in ("final", "outputs", "ts", "t"):
        if name in roots and not np.allclose(roots[name], seen[name], rtol=tolerance, atol=tolerance):
            wrong.append(f"{name} is not that of the steps")
    return wrong


def roots_apart(config: FrontDoor, args, sol: dfx.Solution, fields: tuple[Callable, Callable]) -> dict[str, Any]:
    """How far the stages of the steps of `sol`, a solution of ours with dense output, are from roots of their equations, in
    units of what is allowed, and how far steps begin from where those before end. `fields` are the explicit and the implicit
    part."""
    explicit, implicit = fields
    explicit_tableau, tableau = tableaus_of(config.solver)
    if explicit_tableau is None:
        explicit, implicit = None, lambda t, y: fields[0](t, y) + fields[1](t, y)
    size = len(tableau.a_diagonal)
    matrix = lower_matrix(tableau, size, config.dtype) + jnp.diag(jnp.asarray(tableau.a_diagonal, config.dtype))
    c = jnp.asarray([tableau.c1, *tableau.c], config.dtype)
    ts, infos = sol.interpolation.ts, sol.interpolation.infos
    tolerance = args["tolerance"] if config.adaptive else 1e3 * root_tolerance(config)

    def of_step(t0, t1, info):
        h, y0, y1 = t1 - t0, info["y0"], info["y1"]
        k = info.get("k", (y1 - y0)[None])
        explicit_k, k = (None, k) if explicit is None else k
        z = y0 + matrix @ k
        increment = jnp.asarray(tableau.b_sol, config.dtype) @ k
        if explicit is not None:
            z = z + lower_matrix(explicit_tableau, size, config.dtype) @ explicit_k
            increment = increment + jnp.asarray(explicit_tableau.b_sol, config.dtype) @ explicit_k
        times = jnp.where(c == 1, t1, t0 + c * h)

        def of_stage(t, z, k, diagonal):
            system = jnp.eye(config.size, dtype=config.dtype) - h * diagonal * jax.jacfwd(lambda z: implicit(t, z))(z)
            # (Where the slope is infinite, as that of a root at zero, the residual itself.)
            finite = jnp.all(jnp.isfinite(system))
            residual = k - h * implicit(t, z)
            return jnp.where(
                finite, jnp.linalg.solve(jnp.where(finite, system, jnp.eye(config.size)), residual), residual
            )

        apart = [jax.vmap(of_stage)(times, z, k, jnp.asarray(tableau.a_diagonal, config.dtype)), y1 - y0 - increment]
        if explicit is not None:
            # (What is found to a tolerance is an argument here.)
            apart.append(0.1 * (explicit_k - h * jax.vmap(explicit)(times, z)))
        largest = jnp.max(jnp.abs(z))
        return jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in apart])) / (tolerance * (largest + 0.01))

    apart = jax.vmap(of_step)(ts[:-1], ts[1:], infos)
    made = jnp.arange(apart.shape[0]) < sol.interpolation.ts_size - 1
    gap = jnp.abs(infos["y0"][1:] - infos["y1"][:-1]) / (jnp.abs(infos["y0"][1:]) + 1)
    outputs = {}
    if config.event is None:
        requested = args["t0"] + (sol.t1 - args["t0"]) * args["ts"]
        outputs = {"ts": requested, "outputs": jax.vmap(sol.evaluate)(requested)}
    return (
        outputs
        | {name: sol.stats[name] for name in COUNTS}
        | {
            "apart": jnp.max(jnp.where(made & (ts[1:] > ts[:-1]), apart, 0)),
            "gap": jnp.max(jnp.where(made[1:, None], gap, 0), initial=0),
            "start": jnp.max(jnp.abs(infos["y0"][0] - args["y0"])),
            "final": sol.evaluate(sol.ts["t1"][0]),
            "t": sol.ts["t1"][0],
        }
    )
