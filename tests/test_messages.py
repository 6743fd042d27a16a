"""Arguments that make no sense are refused by a message of our own, which quotes the call and names the argument.

Run without jaxtyping's hook, as users run (`make test` does so apart): under the hook the type checker complains first.
"""

import math
import re

import diffrax as dfx
import jax.numpy as jnp
import pytest

import parallel_diffrax as pdx

from .problems import parallel_solver


pytestmark = pytest.mark.messages

TSIT5, STEP = dfx.Tsit5(), lambda c, x: (0.5 * c, c)
NEWTON = pdx.ParallelNewton

# The call, the exception, what the message says.
REFUSED = [
    *((lambda n=n: parallel_solver(TSIT5, n), ValueError, f"ParallelSolver(num_steps={n})") for n in (0, -1)),
    *((lambda n=n: parallel_solver(TSIT5, n), TypeError, f"ParallelSolver(num_steps={n})") for n in (2.5, True)),
    (lambda: parallel_solver(TSIT5, 4, root_find_max_steps=0), ValueError, "root_find_max_steps=0"),
    (lambda: parallel_solver(TSIT5, 4, root_find_max_steps=1.5), TypeError, "root_find_max_steps=1.5"),
    (lambda: parallel_solver(dfx.ODETerm(lambda t, y, args: y), 4), TypeError, "for example `diffrax.Tsit5()`"),
    (lambda: parallel_solver(TSIT5, 4, root_finder=TSIT5), TypeError, "for example `ParallelNewton()`"),
    (lambda: parallel_solver(TSIT5, 4, predictor=TSIT5), TypeError, "for example `CoarsePredictor()`"),
    (lambda: parallel_solver(TSIT5, 4, policy=TSIT5), TypeError, "for example `CostPolicy()`"),
    (lambda: parallel_solver(TSIT5, predictor=pdx.WarmStart()), ValueError, "`ParallelSolver(..., num_steps=...)`"),
    (lambda: parallel_solver(TSIT5, 4, progress_meter=1), TypeError, "for example `diffrax.TextProgressMeter()`"),
    (lambda: parallel_solver(parallel_solver(TSIT5, 4), 4), ValueError, "ParallelSolver(ParallelSolver(...))"),
    (lambda: parallel_solver(TSIT5, 4, ts=jnp.zeros((2, 2))), ValueError, "a vector of at least two times"),
    *((lambda n=n: pdx.CoarsePredictor(num_steps=n), ValueError, f"CoarsePredictor(num_steps={n})") for n in (0, -3)),
    (lambda: pdx.CoarsePredictor(num_steps=1.5), TypeError, "CoarsePredictor(num_steps=1.5)"),
    *((lambda x=x: pdx.CoarsePredictor(max_share=x), ValueError, f"max_share={x!r}") for x in (0.0, -1.0, 1.5, "1")),
    (lambda: NEWTON(rtol=-1e-3), ValueError, "ParallelNewton(rtol=-0.001)"),
    (lambda: NEWTON(rtol=2.0), ValueError, "ParallelNewton(rtol=2.0)"),
    (lambda: NEWTON(atol=math.nan), ValueError, "ParallelNewton(atol=nan)"),
    (lambda: NEWTON(norm=None), TypeError, "ParallelNewton(norm=None)"),
    (lambda: NEWTON(jacobian=1), TypeError, "for example `Dense()`"),
    (lambda: NEWTON(scan=1), TypeError, "for example `AssociativeScan()`"),
    (lambda: pdx.ELK(damping=1), TypeError, "for example `AdaptiveDamping()`"),
    (lambda: pdx.ELK(estimator=1), TypeError, "for example `KalmanFilter()`"),
    (lambda: pdx.damping.FixedDamping(-1.0), ValueError, "FixedDamping(value=-1.0)"),
    (lambda: pdx.damping.AdaptiveDamping(initial=0.0), ValueError, "AdaptiveDamping(initial=0.0)"),
    (lambda: pdx.jacobians.Hutchinson(0, None), ValueError, "Hutchinson(num_probes=0)"),
    (lambda: pdx.jacobians.Clipped(1), TypeError, "for example `Diagonal()`"),
    (lambda: pdx.jacobians.Clipped(limit=-1.0), ValueError, "Clipped(limit=-1.0)"),
    (lambda: pdx.jacobians.Scaled(2.0), ValueError, "Scaled(k=2.0)"),
    (lambda: pdx.jacobians.Scaled(0.5, 1), TypeError, "for example `Dense()`"),
    *((lambda x=x: pdx.AdaptivePolicy(max_exponent=x), ValueError, "max_exponent=") for x in (math.nan, "1")),
    (lambda: pdx.AdaptivePolicy(min_steps=0), ValueError, "AdaptivePolicy(min_steps=0)"),
    (lambda: pdx.AdaptivePolicy(min_steps=1.5), TypeError, "AdaptivePolicy(min_steps=1.5)"),
    (lambda: pdx.AdaptivePredictor(rtol=-1.0), ValueError, "AdaptivePredictor(rtol=-1.0)"),
    (lambda: pdx.WarmStart(pdx.WarmStart()), TypeError, "expected a predictor that needs no trajectory"),
    (lambda: pdx.WarmStart(num_windows=0), ValueError, "an integer of at least 1"),
    (lambda: pdx.predictors.MultilevelPredictor(num_steps=True), TypeError, "MultilevelPredictor(num_steps=True)"),
    (lambda: pdx.predictors.MultilevelPredictor(num_steps=-1), ValueError, "MultilevelPredictor(num_steps=-1)"),
    (lambda: pdx.predictors.MultilevelPredictor(predictor=1), TypeError, "for example `CoarsePredictor()`"),
    (
        lambda: pdx.predictors.MultilevelPredictor(predictor=pdx.WarmStart()),
        ValueError,
        "WarmStart(MultilevelPredictor",
    ),
    (lambda: pdx.MultipleShooting(TSIT5, True), TypeError, "num_substeps=True"),
    (lambda: pdx.MultipleShooting(TSIT5, 0), ValueError, "num_substeps=0"),
    (lambda: pdx.MultipleShooting(dfx.Kvaerno3(), 4), ValueError, "explicit Runge-Kutta"),
    (lambda: pdx.scans.BlockedScan(radix=True), TypeError, "BlockedScan(radix=True)"),
    (lambda: pdx.scans.BlockedScan(radix=1), ValueError, "BlockedScan(radix=1)"),
    (lambda: pdx.scans.BlockedScan(num_carries=0), ValueError, "BlockedScan(num_carries=0)"),
    (lambda: pdx.scans.BlockedScan(carries=1), TypeError, "for example `KoggeStoneScan()`"),
    (lambda: pdx.scans.KernelScan(3), TypeError, "KernelScan(otherwise=3)"),
    (lambda: pdx.scans.ShardedScan(3), TypeError, "ShardedScan(mesh=3)"),
    (lambda: pdx.parallel_scan(STEP, jnp.ones(2), None, -1), ValueError, "length=-1"),
    (lambda: pdx.parallel_scan(STEP, jnp.ones(2), None, 1.5), TypeError, "length=1.5"),
    (lambda: pdx.parallel_scan(STEP, jnp.ones(2), None, 4, root_finder=1), TypeError, "parallel_scan(root_finder=1)"),
    (lambda: pdx.parallel_scan(STEP, jnp.ones(2), None, 4, policy=1), TypeError, "parallel_scan(policy=1)"),
    (lambda: pdx.parallel_scan(STEP, jnp.ones(2), None, 4, max_steps=0), ValueError, "parallel_scan(max_steps=0)"),
    (lambda: pdx.parallel_scan(STEP, jnp.ones(2, int), None, 4), TypeError, "floating-point or complex"),
    (lambda: pdx.refine(1), TypeError, "refine(sol)"),
]


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_an_argument_that_makes_no_sense_is_refused_by_a_message_of_ours(call, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert type(caught.value) is error
