"""Random fields, grids and options: no silent wrong answer, no crash, in 60 cases of four programs (`make fuzz`: more)."""

import diffrax as dfx
import jax.numpy as jnp
import pytest

import parallel_diffrax as pdx

from .fuzzing import Config, run


# Between them: all policies, predictors, kinds of root finder and controllers, both dtypes, a batch, a pytree.
CONFIGS = [
    Config(fallback=pdx.LyapunovFallback(min_steps=4)),
    Config(fallback=pdx.SequentialFallback(), root_finder="diagonal", dtype=jnp.float32, controller="to", size=2),
    Config(dfx.Heun(), 7, "elk", pdx.ConstantPredictor(), pdx.SequentialFallback(), controller="pid", size=1),
    Config(
        dfx.ReversibleHeun(),
        30,
        predictor=pdx.ConstantPredictor(),
        fallback=pdx.NoFallback(),
        batch=5,
        container="dict",
    ),
]


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_no_case_is_wrong_without_saying_so(number):
    found = []
    run(CONFIGS[number], 15, number, found.append)
    assert not found, "\n".join(found)
