"""Random fields, grids and options: no silent wrong answer, no crash, in 100 cases of five programs (`make fuzz`: more). And
the fuzzer itself reports errors that are planted in answers."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .fuzz_front_door import FrontDoor, wrong_roots
from .fuzzing import answer, arrays, Case, Config, front_door_programs, hold_to_diffrax, roots_program, run, run_program
from .problems import only_full


# Between them: all policies, two predictors, kinds of root finder, controllers, both dtypes, a batch, a pytree. Two stages,
# since the field is what compiles slowest; the long run draws other solvers too. The last two are the defaults.
CONFIGS = [
    Config(dfx.Heun(), policy=pdx.AdaptivePolicy(min_steps=4)),
    Config(
        dfx.Heun(),
        7,
        "elk-diagonal",
        pdx.ConstantPredictor(),
        pdx.policies.ParallelThenSequential(),
        controller="to",
        dtype=jnp.float32,
        size=2,
    ),
    Config(
        dfx.ReversibleHeun(),
        30,
        predictor=pdx.ConstantPredictor(),
        policy=pdx.policies.ParallelOnly(),
        controller="pid",
        batch=(5,),
        container="dict",
    ),
    FrontDoor(dfx.Heun(), controller="pid", size=2, derivative="reverse"),
    Config(dfx.Heun(), None, policy=pdx.policies.CostPolicy(), controller="pid"),
]


@pytest.mark.parametrize("number", [0, *only_full(1, 2, 3, 4)])
def test_no_case_is_wrong_without_saying_so(number):
    found, outcomes = [], []
    run(CONFIGS[number], 16, number, found.append, outcomes.append)
    assert not found, "\n".join(found)
    compared = ("values: compared", "front door, adaptive: compared")
    assert sum(outcome.startswith(compared) for outcome in outcomes) >= 5


# Damped oscillations, of which every digit is determined.
CALM = Case(
    t0=0.0,
    span=2.0,
    windows=1.0,
    rtol=1e-8,
    y0=(1.0, 0.5, -0.3),
    weights={"damp": 0.3, "rotate": 1.0, "square": 0.3},
    nan_t=np.inf,
    nan_y=np.inf,
    inf_y=np.inf,
    ts=(0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9, 1.0),
    pulse=(0.2, 0.6),
    level=0.3,
    key=3.0,
)
NAMES = ("damp", "rotate", "square")
WATCHED = [
    (FrontDoor(dfx.Heun(), controller="pid", size=2, derivative="reverse", names=NAMES), 1e-9),
    (
        FrontDoor(
            dfx.Tsit5(),
            controller="clip",
            dtype=jnp.float32,
            derivative="forward",
            adjoint=dfx.ForwardMode(),
            names=NAMES,
        ),
        1e-3,
    ),
    (FrontDoor(dfx.Bosh3(), controller="pid", event="down", derivative="reverse", backward=True, names=NAMES), 1e-7),
    # Its derivative moves with the controller's choice of steps, which the disturbed runs of Diffrax change.
    (FrontDoor(dfx.Kvaerno3(), controller="pid", derivative="reverse", names=NAMES), 1e-3, 1e-2),
    (FrontDoor(dfx.KenCarp3(), derivative="forward", adjoint=dfx.ForwardMode(), names=NAMES), 1e-3),
]


def planted_errors(config: FrontDoor, seen, value_size: float, derivative_size: float):
    """The answer with one error in each."""
    for name in ("final", "outputs", "t", "ts", "derivative"):
        size = derivative_size if name == "derivative" else value_size
        if name in seen:
            yield name, seen | {name: seen[name] * (1 + size)}
            # In one entry only, the largest.
            one = np.array(seen[name], ndmin=1)
            one.flat[np.argmax(np.abs(one))] *= 1 + size
            yield name, seen | {name: one.reshape(np.shape(seen[name]))}
            yield name, seen | {name: np.full_like(seen[name], np.nan)}
    for name in ("num_steps", "num_accepted_steps", "num_rejected_steps"):
        yield "steps", seen | {name: seen[name] + 1}
    lie = np.array(True)
    yield "failure", seen | {"successful": ~lie, "event_occurred": ~lie}
    yield "failure", seen | {"successful": ~lie, "event_occurred": ~lie, "max_steps_reached": lie}
    if config.event is not None:
        yield "steps", seen | {"successful": lie, "event_occurred": ~lie}


@pytest.mark.full
@pytest.mark.parametrize("number", range(5))
def test_an_error_planted_in_an_answer_is_reported(number):
    config, size, *derivative_size = WATCHED[number]
    arg = arrays(config, CALM)
    (seen,) = run_program(config, front_door_programs(config)[0], [arg])
    wrong, outcomes, _ = hold_to_diffrax(config, arg, seen)
    assert not wrong and outcomes[0].endswith(": compared") and "derivative: compared" in outcomes
    for kind, false in planted_errors(config, seen, size, *(derivative_size or [size])):
        wrong, _, _ = hold_to_diffrax(config, arg, false)
        assert any(kind in what for what in wrong), (kind, wrong)


@pytest.mark.full
def test_a_solve_that_diffrax_cannot_finish_is_not_to_succeed():
    config = WATCHED[0][0]
    arg = arrays(config, CALM)
    (seen,) = run_program(config, front_door_programs(config)[0], [arg])
    # Where the field is NaN from the start, no step is accepted.
    lost = arg | {"nan_y": jnp.asarray(0.5)}
    wrong, _, _ = hold_to_diffrax(config, lost, seen)
    assert "a success where the solve of Diffrax is not finite, or failed" in wrong


@pytest.mark.parametrize("infinite", only_full(False, True))
def test_the_reference_is_diffrax_unless_a_step_is_infinite(infinite):
    config = FrontDoor(dfx.Tsit5(), controller="pid", first_step=True, names=("damp", "square"))
    case = Case(**{**vars(CALM), "weights": {"square": 1.0}, "span": 0.98, "inf_y": 20.0 if infinite else np.inf})
    arg = arrays(config, case)
    # The call of ours, made by Diffrax.
    plain = jax.tree.map(
        np.asarray, jax.jit(lambda arg: answer(config, lambda *a, **k: dfx.diffeqsolve(*a, **k), arg))(arg)
    )
    want = jax.tree.map(np.asarray, front_door_programs(config)[1](arg))
    assert bool(want["infinite_step"]) is infinite
    if infinite:
        assert plain["num_steps"] == 256 and want["num_accepted_steps"] > plain["num_accepted_steps"]
    else:
        assert all(np.array_equal(want[name], plain[name]) for name in ("num_steps", "ts", "outputs", "final"))


@pytest.mark.parametrize("config", only_full(WATCHED[3][0], WATCHED[4][0]))
def test_stages_that_are_not_roots_are_found(config):
    arg = arrays(config, CALM)
    (seen,) = run_program(config, front_door_programs(config)[0], [arg])
    roots_of = lambda other: jax.tree.map(np.asarray, roots_program(config)(arg, other))
    assert not wrong_roots(config, arg, roots_of(arg), seen)
    assert wrong_roots(
        config, arg, roots_of(arg), seen | {"final": seen["final"] * (1 + 0.1 ** (2 if config.adaptive else 6))}
    )
    # The implicit part is `damp`, the explicit one `rotate`.
    for name in ("damp", "rotate"):
        other = arg | {"weights": arg["weights"] | {name: 2 * arg["weights"][name]}}
        assert wrong_roots(config, arg, roots_of(other), seen)
