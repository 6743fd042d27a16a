"""A fuzzer: random fields, grids and options, against Diffrax's own steps one after the other.

What must hold of every case: if the result says success, then every state is finite, every step's equation holds to
the root finder's tolerance or to rounding, and every output agrees with the sequential solve as far as its conditioning
allows; and what the sequential solve can do, a policy that finishes in sequence can.

Compiling is the cost. So a `Config` is all that is static, and everything else about a `Case` is an argument of one
compiled program: the field is a sum of terms with weights.

`python -m tests.fuzzing 2000` makes a long run, with other configurations every 20 cases.
"""

import argparse
import dataclasses
import functools
import sys
import time
import warnings
from typing import Any

import diffrax as dfx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from hypothesis import given, HealthCheck, Phase, seed, settings, strategies as st

import parallel_diffrax as pdx


NUM_TS = 9
# Sequential solves whose every step is disturbed by as much as the parallel one's: how far apart these come is how far the
# solution is determined.
NUM_SHADOWS = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a program is compiled for."""

    solver: dfx.AbstractSolver = dfx.Bosh3()
    num_steps: int = 40
    root_finder: str = "newton"
    predictor: Any = pdx.CoarsePredictor()
    policy: Any = pdx.AdaptivePolicy()
    controller: str = "constant"
    dtype: Any = jnp.float64
    size: int = 3
    batch: int | None = None
    container: str = "array"


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
}


def field(t, y, case):
    """A sum of terms. Those of weight zero are not there, even if they are not finite."""
    x, v, w = y[0], y[-1], case["weights"]
    lorenz = jnp.stack([10 * (y[1] - x), x * (28 - v) - y[1], x * y[1] - 8 / 3 * v]) if len(y) == 3 else jnp.sin(5 * y)
    terms = {
        "damp": -y,
        "rotate": jnp.roll(y, 1) * jnp.where(jnp.arange(len(y)) == 0, -1, 1) if len(y) > 1 else jnp.zeros_like(y),
        "cubic": jnp.zeros_like(y).at[-1].set((1 - x**2) * v),
        "chaos": lorenz,
        "stiff": jnp.cos(t) - y,
        "jump": jnp.where(y > 0.1, -1.0, 1.0),
        "square": y**2,
        "grow": y,
        "force": jnp.full_like(y, jnp.cos(3 * t)),
        "root": -jnp.sqrt(y),
    }
    total = jnp.zeros_like(y)
    for name, term in terms.items():
        total = total + jnp.where(w[name] != 0, w[name] * term, 0).astype(y.dtype)
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


def solve(config: Config, case):
    """`diffeqsolve` in parallel."""
    root_finder = ROOT_FINDERS[config.root_finder](case["rtol"].astype(config.dtype))
    solver = pdx.ParallelSolver(config.solver, config.num_steps, root_finder, 32, config.predictor, config.policy)
    t0, span = case["t0"], case["span"]
    dt0, max_steps, controller = span / case["windows"], 6, dfx.ConstantStepSize()
    if config.controller == "pid":
        max_steps, controller = 24, dfx.PIDController(rtol=1e-3, atol=1e-5)
    if config.controller == "to":
        dt0, controller = None, dfx.StepTo(t0 + span * jnp.asarray([0.0, 0.2, 0.25, 0.7, 1.0], config.dtype))
    subs = {"t1": dfx.SubSaveAt(t1=True), "ts": dfx.SubSaveAt(ts=t0 + span * case["ts"])}
    term = dfx.ODETerm(lambda t, y, case: pack(field(t, unpack(y, config.container), case), config.container))
    return dfx.diffeqsolve(
        term, solver, t0, t0 + span, dt0, pack(case["y0"], config.container), case, throw=False, max_steps=max_steps,
        saveat=dfx.SaveAt(subs=subs, dense=True, solver_state=True), stepsize_controller=controller,
    )  # fmt: skip


def stepper(config: Config, case):
    """The base solver's own `init` and `step`, on vectors, in the direction of time that Diffrax steps in."""
    direction = jnp.where(case["t0"] < case["t0"] + case["span"], 1, -1).astype(config.dtype)
    solver = config.solver
    if isinstance(solver, dfx.AbstractImplicitSolver):
        newton = optx.Newton(rtol=case["rtol"].astype(config.dtype), atol=1e-2 * case["rtol"].astype(config.dtype))
        solver = dataclasses.replace(solver, root_finder=newton)
    term = dfx.ODETerm(lambda t, y, _: direction * field(direction * t, y, case))

    def init(t0, t1, y):
        return solver.init(term, t0, t1, y, None)

    def step(t0, t1, y, memory):
        y1, _, info, memory, _ = solver.step(term, t0, t1, y, None, memory, made_jump=False)
        return y1, info, memory

    return init, step


def examine(config: Config, case):
    """Solves one case, and compares. **Returns:** numbers to judge by."""
    sol = solve(config, case)
    # The comparison need not be strict, the solve must be.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return compare(config, case, sol)


def compare(config: Config, case, sol: dfx.Solution):
    """What `examine` returns for the solution of a case."""
    init, step = stepper(config, case)
    fine = sol.interpolation.infos["steps"]
    windows = sol.stats["num_accepted_steps"]
    starts, ends = (jnp.reshape(ts, -1) for ts in (fine.ts[:, :-1], fine.ts[:, 1:]))
    states = fine.infos["y0"]
    ys = jax.vmap(jax.vmap(lambda y: unpack(y, config.container)))(states).reshape(starts.shape[0], -1)
    final = unpack(jax.tree.map(lambda x: x[0], sol.ys["t1"]), config.container)
    count = windows * config.num_steps
    used = jnp.arange(starts.shape[0]) < count
    starts, ends = (jnp.where(used, t, starts[0]) for t in (starts, ends))
    following = jnp.where((jnp.arange(starts.shape[0]) == count - 1)[:, None], final, jnp.roll(ys, -1, axis=0))

    eps = jnp.finfo(config.dtype).eps
    size = lax.cummax(jnp.maximum(jnp.maximum(jnp.abs(ys), jnp.abs(following)), jnp.abs(case["y0"])))
    stateful = isinstance(config.solver, (dfx.LeapfrogMidpoint, dfx.ReversibleHeun))

    # Each step made once more, from the states of the solution and close by.
    def again(memory, x):
        t0, t1, y, wanted, used = x
        factors = jnp.asarray([1, 1 - 4 * eps, 1 + 4 * eps], y.dtype)
        step_from = lambda y: step(t0, t1, y, memory if stateful else init(t0, t1, y))
        y1, _, memories = jax.vmap(step_from)(factors[:, None] * y)
        noise = jnp.max(jnp.abs(y1[1:] - y1[0]), axis=0)
        memory = jax.tree.map(lambda a, b: jnp.where(used, a[0], b), memories, memory)
        return memory, (jnp.abs(y1[0] - wanted), noise)

    y0 = case["y0"]
    first = init(starts[0], ends[0], y0)
    _, (defect, noise) = lax.scan(again, first, (starts, ends, ys, following, used))
    rounding = 32 * noise + 32 * eps * jnp.max(size, axis=1, keepdims=True)
    if stateful:
        # What the solver remembers here is made of steps that round differently, none of which it forgets.
        rounding = jnp.cumsum(rounding, axis=0)
    allowed = case["rtol"] * size + rounding
    ratio = jnp.where(used[:, None], jnp.where(defect == 0, 0, defect / allowed), 0)

    # The same steps in sequence, as they are and disturbed.
    def sequence(factor, signs):
        def body(carry, x):
            y, memory = carry
            t0, t1, disturbance, used, k = x
            y1, info, new_memory = step(t0, t1, y, memory)
            y1 = y1 + factor * disturbance * signs[k]
            kept = jax.tree.map(lambda a, b: jnp.where(used, a, b), (y1, new_memory), carry)
            return kept, (kept[0], info)

        disturbance = jnp.where(jnp.isfinite(defect), defect, 0) + 16 * eps * size + 4 * noise
        disturbance = jnp.where(jnp.isfinite(disturbance), disturbance, 0)
        xs = (starts, ends, disturbance, used, jnp.arange(starts.shape[0]))
        return lax.scan(body, (y0, first), xs)[1]

    rng = np.random.default_rng(0)
    signs = jnp.asarray(rng.choice([-1, 1], (1 + NUM_SHADOWS, *ys.shape)), config.dtype)
    all_ys, all_infos = jax.vmap(sequence)(jnp.arange(1 + NUM_SHADOWS) > 0, signs)
    want, seq_infos = jax.tree.map(lambda x: x[0], (all_ys, all_infos))
    spread = jnp.max(jnp.abs(all_ys[1:] - want), axis=0)
    # Beyond where the sequential solve itself is not determined at all, nothing is compared.
    lost = lax.cummax(jnp.any(~jnp.isfinite(spread), axis=1).astype(int)) > 0
    slack = 100 * lax.cummax(jnp.where(jnp.isfinite(spread), spread, 0)) + 100 * eps * size
    apart = jnp.where((used & ~lost)[:, None], jnp.abs(following - want) / jnp.where(slack > 0, slack, 1), 0)

    # Saved outputs, by the base solver's interpolant on the sequential solve.
    direction = jnp.where(case["t0"] < case["t0"] + case["span"], 1, -1).astype(config.dtype)
    order = jnp.where(used, ends, jnp.inf)

    def output(t):
        index = jnp.clip(jnp.searchsorted(order, t, side="left"), 0, jnp.maximum(count - 1, 0))
        local = jax.tree.map(lambda x: x[index], seq_infos)
        value = config.solver.interpolation_cls(t0=starts[index], t1=ends[index], **local).evaluate(t)
        # An interpolant may be a small difference of large stages.
        parts = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x)) for x in jax.tree.leaves(local)])
        return value, 10 * slack[index] + 1e4 * eps * jnp.abs(value) + 1e2 * eps * parts, lost[index]

    ts = case["t0"] + case["span"] * case["ts"]
    expected, room, beyond = jax.vmap(output)(ts * direction)
    got = jax.vmap(lambda y: unpack(y, config.container))(sol.ys["ts"])
    empty = case["span"] == 0
    output_apart = jnp.where(beyond[:, None] | empty, 0, jnp.abs(got - expected) / jnp.where(room > 0, room, 1))
    return {
        "success": sol.result == dfx.RESULTS.successful,
        "max_steps": sol.result == dfx.RESULTS.max_steps_reached,
        "finite": jnp.all(jnp.isfinite(jnp.where(used[:, None], ys, 0))) & jnp.all(jnp.isfinite(final)),
        "arrived": (sol.ts["t1"][0] == case["t0"] + case["span"]) & jnp.all(sol.ts["ts"] == ts),
        "outputs_finite": jnp.all(jnp.isfinite(got)),
        "defect": jnp.max(ratio),
        "defect_is_nan": jnp.any(jnp.isnan(ratio)),
        "apart": jnp.max(apart),
        "output_apart": jnp.max(output_apart),
        "empty_is_y0": ~empty | jnp.all(got == y0),
        "sequential_finite": jnp.all(jnp.isfinite(want)),
        "reached_end": jnp.where(used, ends, -jnp.inf).max() >= direction * (case["t0"] + case["span"]),
        "lost": jnp.any(lost),
        "windows": windows,
        "parallel_steps": pdx.statistics(sol).parallel_steps,
        "steps": count,
    }


def problems_of(config: Config, seen) -> list[str]:
    """What is wrong with what was seen; nothing, one hopes."""
    wrong = []
    if seen["success"]:
        for name in ("finite", "arrived", "outputs_finite", "empty_is_y0"):
            if not seen[name]:
                wrong.append(f"success, but not {name}")
        if seen["defect_is_nan"] or not seen["defect"] <= 1:
            wrong.append(f"success, but a step's defect is {seen['defect']} times what is allowed")
        for name in ("apart", "output_apart"):
            if not seen[name] <= 1:
                wrong.append(f"success, but {name} by {seen[name]} times what is allowed")
        if not seen["sequential_finite"] and not seen["lost"]:
            wrong.append("success, but the sequential solve is not finite")
    elif config.controller != "pid" and not isinstance(config.policy, pdx.policies.ParallelOnly):
        if seen["sequential_finite"] and seen["reached_end"] and not seen["lost"]:
            wrong.append("failure where the sequential solve succeeds")
    return wrong


@functools.cache
def program(config: Config):
    function = functools.partial(examine, config)
    return jax.jit(jax.vmap(function) if config.batch is not None else function)


def arrays(config: Config, case: Case):
    """A case as arguments of the program."""
    number = lambda x: jnp.asarray(x, config.dtype)
    values = {k: number(v) for k, v in dataclasses.asdict(case).items() if k not in ("weights", "y0", "ts")}
    if config.controller == "to" and case.span == 0:
        # Diffrax refuses times that do not increase.
        values["span"] = number(1.0)
    weights = {name: number(case.weights.get(name, 0.0)) for name in WEIGHTS}
    ts = number(np.sort(case.ts))
    return values | {"weights": weights, "y0": number(case.y0[: config.size]), "ts": ts}


def check(config: Config, cases: list[Case]) -> list[str]:
    """Runs one case, or a batch of them."""
    args = [arrays(config, case) for case in cases]
    if config.batch is not None:
        seen = program(config)(jax.tree.map(lambda *x: jnp.stack(x), *args))
        seen = [{name: np.asarray(x)[i] for name, x in seen.items()} for i in range(len(cases))]
    else:
        seen = [jax.tree.map(np.asarray, program(config)(arg)) for arg in args]
    return [f"{wrong}: {config} {case} {s}" for case, s in zip(cases, seen) for wrong in problems_of(config, s)]


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
    )  # fmt: skip


def random_config(number: int) -> Config:
    """The configurations of the long run."""
    rng = np.random.default_rng(number)
    pick = lambda *options: options[rng.integers(len(options))]
    erk = (dfx.Heun(), dfx.Bosh3(), dfx.Tsit5(), dfx.Dopri5())
    solver = pick(*erk, *erk, dfx.Euler(), dfx.Dopri8(), dfx.LeapfrogMidpoint(), dfx.ReversibleHeun())
    fixed = isinstance(solver, (dfx.Euler, dfx.LeapfrogMidpoint))
    size, container = pick((3, "array"), (3, "array"), (1, "array"), (2, "array"), (3, "dict"), (2, "complex"))
    return Config(
        solver=solver,
        num_steps=int(pick(1, 7, 40, 40, 150, 300)),
        root_finder=pick("newton", "newton", "newton", *ROOT_FINDERS),
        predictor=pick(pdx.ConstantPredictor(), pdx.CoarsePredictor(), pdx.CoarsePredictor(num_steps=8)),
        policy=pick(
            pdx.AdaptivePolicy(),
            pdx.AdaptivePolicy(min_steps=4),
            pdx.policies.ParallelThenSequential(),
            pdx.policies.ParallelOnly(),
        ),
        controller=pick("constant", "constant", "to") if fixed else pick("constant", "constant", "pid", "to"),
        dtype=pick(jnp.float64, jnp.float64, jnp.float32),
        size=size,
        batch=pick(None, None, 4),
        container=container,
    )


def run(config: Config, max_examples: int, number: int, report):
    """`max_examples` cases of one configuration. Everything wrong is handed to `report`."""
    batch = 1 if config.batch is None else config.batch

    @seed(number)
    @settings(
        max_examples=-(-max_examples // batch), deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(cases(), min_size=batch, max_size=batch))
    def one(batch_of_cases):
        for wrong in check(config, batch_of_cases):
            report(wrong)

    one()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", type=int, nargs="?", default=2000)
    parser.add_argument("--start", type=int, default=0, help="number of the first configuration")
    parser.add_argument("--per-config", type=int, default=40)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    warnings.filterwarnings("ignore", message="Complex dtype support in Diffrax")
    found, done, number = [], 0, options.start
    began = time.time()
    while done < options.cases:
        config = random_config(number)
        try:
            run(config, options.per_config, number, found.append)
        except Exception as error:
            found.append(f"crash: {type(error).__name__}: {str(error)[:1000]}: {config}")
        done, number = done + options.per_config, number + 1
        program.cache_clear()
        jax.clear_caches()
        print(
            f"{done} cases, {number - options.start} configurations, {time.time() - began:.0f} s, {len(found)} found",
            flush=True,
        )
        for wrong in found[main.shown :]:
            print("  " + wrong, flush=True)
        main.shown = len(found)
    sys.exit(len(found) > 0)


main.shown = 0

if __name__ == "__main__":
    main()
