"""`diagnostics.estimate_cost` tells what the default policy would choose on a GPU, by estimates that are close to
what was measured.
"""

import json
import pathlib

import diffrax as dfx
import jax.numpy as jnp
import pytest

import parallel_diffrax as pdx
from parallel_diffrax._recurrence import Stepper

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, fitzhugh_nagumo, parallel_solver
from .test_stepper import launch_by_warp


RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"
TERM, Y0 = dfx.ODETerm(lambda t, y, args: fitzhugh_nagumo(t, y)), jnp.array([-1.0, 1.0])


SORTED = dfx.ODETerm(lambda t, y, args: -jnp.sort(y))


def estimate(num_steps, batch_size=1, solver=dfx.Tsit5(), term=TERM):
    return pdx.diagnostics.estimate_cost(term, solver, 0.0, 1.0, Y0, num_steps=num_steps, batch_size=batch_size)


def measured():
    """The rows of the map of regimes with constant steps, without a gradient, that take longer than a call."""
    rows = json.loads((RESULTS / "regimes_gpu.json").read_text())["rows"]
    plain = [r for r in rows if r["problem"] == "FitzHugh-Nagumo" and "steps" in r and not r["gradient"]]
    return [r for r in plain if r["steps"] >= 512]


@pytest.mark.parametrize("row", measured(), ids=lambda row: f"{row['steps']} steps, batch {row['batch']}")
def test_an_estimate_is_within_a_factor_of_three_of_what_was_measured(row):
    found = estimate(row["steps"], row["batch"])
    chosen = found.seconds_in_parallel if found.choice == "in parallel" else found.seconds_in_sequence
    assert 1 / 3 < chosen / (1e-3 * row["ours_ms"]) < 3
    # The least time that Diffrax takes, and that of one member nearly.
    by_diffrax = found.seconds_by_diffrax / (1e-3 * row["diffrax_ms"])
    assert by_diffrax < 1.0 and (row["batch"] > 1 or by_diffrax > 0.7)


def test_the_choice_is_sequential_for_few_steps_and_large_batches_and_parallel_for_many_or_slow_steps():
    assert estimate(64).choice == estimate(512).choice == "in sequence"
    assert estimate(4096).choice == "in parallel"
    assert estimate(4096, batch_size=131072).choice == "in sequence"
    # A step that is not a kernel is slow.
    slow = estimate(512, solver=dfx.Euler(), term=SORTED)
    assert slow.kernel_operations is None and slow.choice == "in parallel"
    assert "by XLA" in str(slow) and "choice: in parallel" in str(slow)


def test_the_operations_are_those_of_the_kernel_by_which_the_policy_chooses(monkeypatch):
    launch_by_warp()
    seen = []
    operations = Stepper.kernel_operations
    monkeypatch.setattr(Stepper, "kernel_operations", property(lambda self: seen.append(operations.fget(self))))
    solver = pdx.ParallelSolver(dfx.Bosh3(), 16, policy=pdx.policies.CostPolicy(kernels="warp"))
    dfx.diffeqsolve(DRIVEN, solver, 0.0, 1.0, 1.0, DRIVEN_Y0, DRIVEN_ARGS, max_steps=1)
    found = pdx.diagnostics.estimate_cost(DRIVEN, dfx.Bosh3(), 0.0, 1.0, DRIVEN_Y0, DRIVEN_ARGS, num_steps=16)
    assert {found.kernel_operations} == set(seen) and found.kernel_operations > 20


def test_memory_is_that_of_twelve_jacobians_a_step_and_a_parallel_solver_stands_for_its_base():
    found = estimate(1000, 8, parallel_solver(dfx.Tsit5(), 4))
    assert found.bytes_in_parallel == 12 * 1000 * 8 * 2 * 2 * 8
    assert found == estimate(1000, 8) and found.state_size == 2


@pytest.mark.messages
@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"num_steps": 1.5}, {"num_steps": 1, "batch_size": 0}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises((TypeError, ValueError), match=r"estimate_cost\((num_steps|batch_size)="):
        pdx.diagnostics.estimate_cost(TERM, dfx.Tsit5(), 0.0, 1.0, Y0, **wrong)
