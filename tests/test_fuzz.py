"""Random fields, grids and options: no silent wrong answer, no crash, in 100 cases of five programs (`make fuzz`: more)."""

import diffrax as dfx
import jax.numpy as jnp
import pytest

import parallel_diffrax as pdx

from .fuzz_front_door import FrontDoor
from .fuzzing import Config, run
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
    run(CONFIGS[number], 12, number, found.append, outcomes.append)
    assert not found, "\n".join(found)
    compared = ("values: compared", "front door, adaptive: compared")
    assert sum(outcome.startswith(compared) for outcome in outcomes) >= 5
