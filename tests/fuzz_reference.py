"""The fuzzer's references: the base solver's steps one after the other, their derivatives and their events.

Explicit and stochastic steps are Diffrax's own. Diffrax's implicit steps raise where a state is not finite, so diagonally
implicit steps are written out here, from the tableau of the base solver.
"""

import dataclasses
import functools
import types
from collections.abc import Callable

import diffrax as dfx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

import parallel_diffrax as pdx
from parallel_diffrax._scan import eliminate


# Sequential solves whose every step is disturbed by as much as the parallel one's: how far apart these come is how far the
# solution is determined.
NUM_SHADOWS = 3
# Newton's iterations for a stage of a reference, and the ratio of its first two updates below which its root is unique
# nearby.
NUM_ITERATIONS, RATIO = 12, 0.25


def tableaus_of(solver: dfx.AbstractSolver):
    """The explicit and the implicit tableau of a diagonally implicit method, or `None`."""
    if isinstance(solver, dfx.ImplicitEuler):
        return None, types.SimpleNamespace(c=(), c1=1.0, b_sol=(1.0,), a_lower=(), a_diagonal=(1.0,))
    if not isinstance(solver, dfx.AbstractImplicitSolver):
        return None
    tableau = solver.tableau
    return tableau.tableaus if isinstance(tableau, dfx.MultiButcherTableau) else (None, tableau)


def implicit_step(solver, explicit, implicit, t0, t1, y0):
    """One step of a diagonally implicit or implicit-explicit Runge-Kutta method with the fields `explicit` and `implicit`.

    Returns the state, what the interpolant needs, and whether the stages were found and are unique nearby.
    """
    explicit_tableau, tableau = tableaus_of(solver)
    size, h, dtype = len(tableau.a_diagonal), t1 - t0, y0.dtype
    matrices = [lower_matrix(x, size, dtype) for x in (tableau, explicit_tableau) if x is not None]
    times = jnp.asarray([tableau.c1, *tableau.c], dtype), jnp.asarray(tableau.a_diagonal, dtype)

    # A loop, since it compiles in a fraction of the time of the stages one by one.
    def stage(slopes, x):
        i, c, diagonal, rows = x
        t = jnp.where(c == 1, t1, t0 + c * h)
        base = y0 + h * sum(jnp.sum(row[:, None] * k, axis=0) for row, k in zip(rows, slopes))
        z, found = solve_stage(functools.partial(implicit, t), base, h * diagonal)
        new = [implicit(t, z)] if explicit is None else [implicit(t, z), explicit(t, z)]
        return [k.at[i].set(value) for k, value in zip(slopes, new)], found

    none = jnp.zeros((size, len(y0)), dtype)
    slopes, found = lax.scan(stage, [none for _ in matrices], (jnp.arange(size), *times, matrices))
    increments, weights = [h * k for k in slopes], [tableau.b_sol]
    if explicit is not None:
        weights.append(explicit_tableau.b_sol)
    y1 = y0 + sum(jnp.sum(jnp.asarray(b, dtype)[:, None] * k, axis=0) for b, k in zip(weights, increments))
    info = {"y0": y0, "y1": y1}
    if not isinstance(solver, dfx.ImplicitEuler):
        info["k"] = increments[0] if explicit is None else (increments[1], increments[0])
    return y1, info, jnp.all(found)


def lower_matrix(tableau, size: int, dtype):
    rows = [np.zeros(0), *tableau.a_lower]
    return jnp.asarray(np.stack([np.pad(np.asarray(row), (0, size - len(row))) for row in rows]), dtype)


def solve_stage(field, base, factor):
    """`z = base + factor * field(z)` by Newton's method, and whether it converged to a root that is unique nearby."""

    def update(z):
        matrix = jnp.eye(len(z), dtype=z.dtype) - factor * jax.jacfwd(field)(z)
        return eliminate(lax.stop_gradient(matrix), (z - base - factor * field(z))[:, None])[:, 0]

    def iterate(z, _):
        change = update(z)
        return z - change, jnp.max(jnp.abs(change))

    z, changes = lax.scan(iterate, lax.stop_gradient(base), None, length=NUM_ITERATIONS)
    eps = jnp.finfo(z.dtype).eps
    rounding = 1e2 * eps * (jnp.max(jnp.abs(z)) + jnp.max(jnp.abs(base)))
    found = (changes[-1] <= rounding) & ((changes[1] <= RATIO * changes[0]) | (changes[0] <= rounding))
    # One more iteration has the derivative of the root.
    z = lax.stop_gradient(z)
    return z - update(z), lax.stop_gradient(found)


def only_if(config, wanted, fn, *args):
    """`fn(*args)` if it is wanted, else zeros, without the time that it takes, or anything."""
    if isinstance(config.solver, dfx.AbstractSRK) and config.batch:
        # In a batch both branches are taken, with all of their arguments in the batch, which Diffrax refuses.
        return fn(*args)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *args))
    return lax.cond(wanted, fn, lambda *_: nothing, *args)


def stepper(config, case, vector_field, terms):
    """The base solver's `init` and `step`, on vectors, in the direction of time that Diffrax steps in.

    `step` returns the state, what the interpolant needs, the solver's state, and whether the step is determined.
    """
    solver = config.solver
    if tableaus_of(solver) is not None:
        explicit, implicit = vector_field(case)
        implicit_explicit = tableaus_of(solver)[0] is not None

        def step(t0, t1, y, memory):
            fields = (explicit, implicit) if implicit_explicit else (None, lambda t, y: explicit(t, y) + implicit(t, y))
            y1, info, valid = implicit_step(solver, *fields, t0, t1, y)
            return y1, info, memory, valid

        return (lambda t0, t1, y: ()), step
    if isinstance(solver, dfx.AbstractERK | dfx.AbstractSRK):
        # A loop with a derivative in reverse mode.
        solver = dataclasses.replace(solver, scan_kind="bounded" if isinstance(solver, dfx.AbstractERK) else "lax")
    term = terms(case)

    def init(t0, t1, y):
        return solver.init(term, t0, t1, y, None)

    def step(t0, t1, y, memory):
        y1, _, info, memory, _ = solver.step(term, t0, t1, y, None, memory, made_jump=False)
        return y1, info, memory, jnp.array(True)

    return init, step


def compare(config, case, sol: dfx.Solution, gradient, unpack, condition, loss, vector_field, terms):
    """Compares the solution of a case, and the `gradient` of its loss, with the steps in sequence.

    **Returns:** numbers to judge by.
    """
    make_stepper = lambda case: stepper(config, case, vector_field, terms)
    init, step = make_stepper(case)
    fine = sol.interpolation.infos["steps"]
    windows = sol.stats["num_accepted_steps"]
    starts, ends = (jnp.reshape(ts, -1) for ts in (fine.ts[:, :-1], fine.ts[:, 1:]))
    ys = jax.vmap(jax.vmap(unpack))(fine.infos["y0"]).reshape(starts.shape[0], -1)
    final = unpack(jax.tree.map(lambda x: x[0], sol.ys["t1"]))
    y0, empty = case["y0"], case["span"] == 0
    direction = jnp.where(case["t0"] < case["t0"] + case["span"], 1, -1).astype(config.dtype)
    occurred = sol.result == dfx.RESULTS.event_occurred
    event_time = direction * sol.ts["t1"][0]

    # Dense output is infinite where no window was made.
    index = jnp.arange(starts.shape[0])
    made = (index < windows * fine.finite.shape[1]) & (starts < ends)
    used = made & (~occurred | (starts < event_time))
    last = jnp.max(jnp.where(used, index, -1))
    ys = jnp.where(made[:, None], ys, y0)
    starts, ends = (jnp.where(made, t, direction * case["t0"]) for t in (starts, ends))
    # The state after the last step is the solution's, unless an event ended the solve within the step.
    # (A window may have room for more steps than were made in it.)
    following_index = lax.cummin(jnp.append(jnp.where(made, index, last)[1:], last), reverse=True)
    following = jnp.where((index == last)[:, None] & ~occurred, final, ys[following_index])
    known = used & ~(occurred & (index == last))

    eps = jnp.finfo(config.dtype).eps
    size = lax.cummax(
        jnp.maximum(jnp.maximum(jnp.abs(ys), jnp.where(known[:, None], jnp.abs(following), 0)), jnp.abs(y0))
    )
    stateful = isinstance(config.solver, (dfx.LeapfrogMidpoint, dfx.ReversibleHeun))

    # Each step made once more, from the states of the solution and close by.
    def again(memory, x):
        t0, t1, y, wanted, made = x
        factors = jnp.asarray([1, 1 - 4 * eps, 1 + 4 * eps, 1, 1], y.dtype)
        shifts = jnp.asarray([0, 0, 0, -eps, eps], y.dtype) * jnp.maximum(jnp.abs(t0), jnp.abs(t1))
        # Noise has other values at other times.
        shifts = jnp.zeros_like(shifts) if config.noise else shifts

        def step_from(factor, shift):
            begin, end, y_near = t0 + shift, t1 + shift, factor * y
            return step(begin, end, y_near, memory if stateful else init(begin, end, y_near))

        steps_from = lambda factors, shifts: jax.vmap(step_from)(factors, shifts)
        y1, _, memories, valid = only_if(config, made, steps_from, factors, shifts)
        # The field may end within rounding of a step's end: what is not finite there tells nothing.
        near = jnp.where(jnp.isfinite(y1[1:]) | ~jnp.isfinite(y1[:1]), y1[1:], y1[:1])
        noise = jnp.max(jnp.abs(near - y1[:1]), axis=0)
        # The slopes of a step may cancel, but their rounding errors do not.
        slope = sum(field(t0, y) for field in vector_field(case))
        moved = (t1 - t0) * jnp.max(jnp.where(jnp.isfinite(slope), jnp.abs(slope), 0))
        memory = jax.tree.map(lambda a, b: jnp.where(made, a[0], b), memories, memory)
        return memory, (jnp.abs(y1[0] - wanted), noise, moved, valid[0])

    first = init(starts[0], ends[0], y0)
    _, (defect, noise, moved, valid) = lax.scan(again, first, (starts, ends, ys, following, made))
    # The values of a path are rounded too.
    of_path = eps * 0.3 * jnp.sqrt(jnp.abs(case["span"])) * (1 if config.noise else 0)
    rounding = 32 * noise + 32 * (eps * (jnp.max(size, axis=1) + moved) + of_path)[:, None]
    if stateful:
        # What the solver remembers here is made of steps that round differently, none of which it forgets.
        rounding = jnp.cumsum(rounding, axis=0)
    allowed = case["rtol"] * size + rounding
    if (
        config.policy.follows_controller
        and config.controller in ("pid", "clip")
        and tableaus_of(config.solver) is not None
    ):
        # The stages of each step are found to the tolerances of the controller.
        allowed = allowed + 1e-3 * size + 1e-5
    # (Products of larger states overflow, and those of smaller ones beside them underflow. The field of an implicit step is
    # noise where the sine of a state is.)
    valid = valid & (jnp.max(size, axis=1) < (1e8 if tableaus_of(config.solver) is not None else 1e30))
    ratio = jnp.where((known & valid)[:, None], jnp.where(defect == 0, 0, defect / allowed), 0)

    # The same steps in sequence, as they are and disturbed, in value and in derivative.
    rng = np.random.default_rng(0)
    signs = jnp.asarray(rng.choice([-1, 1], (1 + NUM_SHADOWS, 2, *ys.shape)), config.dtype)
    defect = jnp.where(jnp.isfinite(defect) & known[:, None], defect, 0)
    disturbance = lax.stop_gradient(defect + 16 * (eps * size + of_path) + 4 * noise)
    disturbance = jnp.where(jnp.isfinite(disturbance), disturbance, 0)

    def sequence(params, factor, signs):
        init, step = make_stepper(case | params)

        def body(carry, x):
            y, memory = carry
            t0, t1, disturbance, made, signs = x
            # A jump of the field may be at an end of the step, up to rounding.
            shift = 0 if config.noise else factor * eps * jnp.maximum(jnp.abs(t0), jnp.abs(t1))
            t0, t1 = t0 + shift, t1 + shift
            y1, info, new_memory, valid = only_if(config, made, step, t0, t1, y, memory)
            y1 = y1 * (1 + 64 * eps * factor * signs[0]) + factor * disturbance * signs[1]
            kept = jax.tree.map(lambda a, b: jnp.where(made, a, b), (y1, new_memory), carry)
            return kept, (kept[0], info, valid)

        start = params["y0"], init(starts[0], ends[0], params["y0"])
        xs = (starts, ends, disturbance, made, jnp.moveaxis(signs, 0, 1))
        return lax.scan(body, start, xs)[1]

    order = lax.cummax(jnp.where(made, ends, -jnp.inf))
    last_made = jnp.max(jnp.where(made, index, 0))

    def interpolate(infos, t):
        k = jnp.clip(jnp.searchsorted(order, t, side="left"), 0, last_made)
        local = jax.tree.map(lambda x: x[k], infos)
        return config.solver.interpolation_cls(t0=starts[k], t1=ends[k], **local).evaluate(t), local, k

    ts = case["t0"] + case["span"] * case["ts"]

    def sequential_loss(params, factor, signs):
        states, infos, valid = sequence(params, factor, signs)
        if config.event is None:
            outputs = jax.vmap(lambda t: interpolate(infos, t)[0])(ts * direction)
            outputs = jnp.where(empty, params["y0"], outputs)
            end = jnp.where(last < 0, params["y0"], states[last])
            return loss(end, outputs, case["t0"]), (states, infos, valid)
        # The time of the event by one iteration of Newton's method from that time, which has its derivative.
        value = lambda t: condition(direction * t, interpolate(infos, t)[0], case | params)
        at, slope = jax.jvp(value, (event_time,), (jnp.ones_like(event_time),))
        moves = occurred & jnp.array(config.event != "bool")
        t = event_time - jnp.where(moves, (at - lax.stop_gradient(at)) / lax.stop_gradient(slope), 0)
        end = jnp.where(occurred & moves, interpolate(infos, t)[0], states[jnp.maximum(last, 0)])
        return loss(jnp.where(last < 0, params["y0"], end), None, direction * t), (states, infos, valid)

    params = {"y0": y0, "weights": case["weights"]}
    factors = jnp.sign(jnp.arange(1 + NUM_SHADOWS)) * (-1) ** jnp.arange(1 + NUM_SHADOWS)
    function = sequential_loss if gradient is None else jax.value_and_grad(sequential_loss, has_aux=True)
    result = jax.vmap(lambda factor, signs: function(params, factor.astype(config.dtype), signs))(factors, signs)
    all_ys, all_infos, all_valid = result[1] if gradient is None else result[0][1]
    want, infos = jax.tree.map(lambda x: x[0], (all_ys, all_infos))
    spread = jnp.max(jnp.abs(all_ys[1:] - want[None]), axis=0)
    # Beyond where the sequential solve itself is not determined at all, nothing is compared.
    undetermined = jnp.any(~jnp.isfinite(spread), axis=1) | ~jnp.all(all_valid, axis=0) | ~valid
    lost = used & (lax.cummax((made & undetermined).astype(int)) > 0)
    slack = 100 * lax.cummax(jnp.where(jnp.isfinite(spread), spread, 0)) + 100 * eps * size
    apart = jnp.where((known & ~lost)[:, None], jnp.abs(following - want) / jnp.where(slack > 0, slack, 1), 0)

    # Saved outputs, by the base solver's interpolant on the sequential solve.
    def output(t):
        value, local, k = interpolate(infos, t)
        # An interpolant may be a small difference of large stages.
        parts = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x)) for x in jax.tree.leaves(local)])
        return value, 10 * slack[k] + 1e4 * eps * jnp.abs(value) + 1e2 * eps * parts, lost[k]

    # With an event, only the state at its time is saved in any case.
    got = jax.vmap(unpack)(sol.ys["ts"]) if config.event is None else final[None]
    expected, room, beyond = jax.vmap(output)(ts * direction if config.event is None else event_time[None])
    # (The event may be before the first step.)
    compared = ~(beyond[:, None] | empty | (last < 0)) & (occurred | (config.event is None))
    # (The interpolant of a step may overflow where its end does not.)
    compared = compared & jnp.isfinite(expected)
    output_apart = jnp.where(compared, jnp.abs(got - expected) / jnp.where(room > 0, room, 1), 0)

    seen = {
        "success": sol.result == dfx.RESULTS.successful,
        "max_steps": sol.result == dfx.RESULTS.max_steps_reached,
        "occurred": occurred,
        "finite": jnp.all(jnp.isfinite(jnp.where(used[:, None], ys, 0))) & jnp.all(jnp.isfinite(final)),
        "arrived": (sol.ts["t1"][0] == case["t0"] + case["span"])
        & (jnp.all(sol.ts["ts"] == ts) if config.event is None else True),
        "outputs_finite": jnp.all(jnp.isfinite(got) | ~jnp.isfinite(expected)),
        "defect": jnp.max(ratio),
        "defect_is_nan": jnp.any(jnp.isnan(ratio)),
        "apart": jnp.max(apart),
        "output_apart": jnp.max(output_apart),
        "empty_is_y0": ~empty | jnp.all(got == y0),
        "sequential_finite": jnp.all(jnp.isfinite(want)),
        # A state that one step multiplies by so much is out of reach of Newton's method for its stages.
        "explodes": jnp.max(jnp.where(used[:, None], jnp.abs(want), 0)) > 1e8 * (1 + jnp.max(jnp.abs(y0))),
        "reached_end": jnp.where(used, ends, -jnp.inf).max() >= direction * (case["t0"] + case["span"]),
        "lost": jnp.any(lost),
        "windows": windows,
        "parallel_steps": pdx.statistics(sol).parallel_steps,
        "steps": jnp.sum(used),
    }
    if config.event is not None:
        value_at = lambda t: condition(direction * t, interpolate(infos, t)[0], case)
        spans = starts, ends
        seen |= events(
            config,
            case,
            want,
            slack,
            used,
            made,
            lost,
            occurred,
            last,
            direction * ends,
            final,
            condition,
            value_at,
            spans,
        )
    if gradient is not None:
        flat = lambda tree: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])
        gradients = jax.vmap(flat)(result[1])
        reference, got = gradients[0], gradient
        spread = jnp.max(jnp.abs(gradients[1:] - reference), axis=0)
        room = 100 * spread + 1e3 * eps * (jnp.abs(reference) + jnp.max(jnp.abs(y0)) + 1)
        if config.derivative == "forward":
            tangent = jnp.asarray(tangent_of(reference.shape[0]), reference.dtype)
            reference, room = jnp.sum(reference * tangent), jnp.sum(room * jnp.abs(tangent))
        determined = jnp.all(jnp.isfinite(room)) & jnp.all(jnp.isfinite(reference))
        seen |= {
            "derivative_apart": jnp.max(jnp.where(determined, jnp.abs(got - reference) / room, 0)),
            "derivative_determined": determined,
            "derivative_is_nan": jnp.all(jnp.isnan(got if config.derivative == "forward" else got[-len(y0) :])),
        }
    return seen


def event_tolerance(config) -> float:
    """Of the search for the time of an event."""
    return 1e-10 if config.dtype == jnp.float64 else 1e-5


def tangent_of(count: int):
    """The direction of forward-mode derivatives."""
    return np.random.default_rng(2).uniform(0.5, 1.5, count)


def events(
    config,
    case,
    want,
    slack,
    used,
    made,
    lost,
    occurred,
    last,
    ends,
    final,
    condition,
    value_at: Callable,
    spans: tuple,
):
    """Whether the event is where the sequential states have it, and whether its time can be found in the step from the
    `spans` as Diffrax looks for it."""
    value = jax.vmap(lambda t, y: condition(t, y, case))
    values, margin = value(ends, want), slack[:, 0]
    before = jnp.concatenate([condition(case["t0"], case["y0"], case)[None], values[:-1]])
    old, new = before > 0, values > 0
    crossing = {"bool": new, "up": ~old & new, "down": old & ~new, "any": jnp.sign(before) != jnp.sign(values)}[
        config.event
    ]
    index = jnp.arange(len(values))
    first = jnp.min(jnp.where(made & crossing, index, len(values)))
    if config.event == "bool":
        # It may be true before the first step.
        first = jnp.where(before[0] > 0, -1, first)
    ambiguous = jnp.any(used & (index <= jnp.maximum(last, first)) & ((jnp.abs(values) <= margin) | lost))
    ambiguous = ambiguous | (jnp.abs(before[0]) <= jnp.maximum(margin[0], jnp.finfo(values.dtype).tiny))
    size = jnp.abs(values - before)[jnp.maximum(last, 0)]
    at_event = condition(0, final, case)
    found = jnp.array(True)
    if config.event != "bool":
        lower, upper = (t[jnp.clip(first, 0, len(values) - 1)] for t in spans)
        finder = optx.Newton(rtol=event_tolerance(config), atol=event_tolerance(config))
        options = {"lower": lower, "upper": upper}
        search = optx.root_find(lambda t, _: value_at(t), finder, upper, options=options, throw=False)
        found = (search.result == optx.RESULTS.successful) | (first >= len(values))
    return {
        "event_found": found,
        "event_determined": ~ambiguous,
        "event_right": jnp.where(occurred, first == last, first > last),
        "event_at_zero": jnp.array(config.event == "bool")
        | ~occurred
        | (jnp.abs(at_event) <= 1e-3 * size + margin[jnp.maximum(last, 0)]),
    }
