"""`AdaptivePolicy`: parallel where it pays, in segments that follow the dynamics, sequential where it cannot; right in
either case, and alike in a batch.
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx
from benchmarks.flows import lorenz63
from parallel_diffrax._recurrence import _policies as policy

from .problems import parallel_solver, relative_difference


T1, NUM_STEPS = 40.0, 4096
TS = jnp.linspace(0.0, T1, NUM_STEPS + 1)
Y0 = jnp.ones(3)


def field(t, y, args):
    """Stable until `args[0]`, then Lorenz's system, `args[1]` times as fast."""
    stable = -y + jnp.stack([jnp.sin(t), jnp.cos(t), 25 + jnp.sin(t)])
    return jnp.where(t < args[0], stable, args[1] * lorenz63(y))


TERM = dfx.ODETerm(field)
CHAOTIC, JUMP, STABLE, UNSTABLE = (jnp.array(args) for args in ([0.0, 1.0], [20.0, 1.0], [99.0, 1.0], [0.0, 10.0]))


def solve(y0, args, num_steps=NUM_STEPS, t1=T1, saveat=dfx.SaveAt(ts=TS, solver_state=True), **options):
    solver = parallel_solver(dfx.Bosh3(), num_steps, **options)
    return dfx.diffeqsolve(TERM, solver, 0.0, t1, t1, y0, args, saveat=saveat, throw=False, max_steps=1)


compiled = jax.jit(solve)


@jax.jit
def one_step_each(ys, args):
    """Diffrax's own step from every saved state."""
    base = dfx.Bosh3()

    def step(t0, t1, y):
        return base.step(TERM, t0, t1, y, args, base.init(TERM, t0, t1, y, args), made_jump=True)[0]

    return jax.vmap(step)(TS[:-1], TS[1:], ys[:-1])


@jax.jit
def in_sequence(args):
    return dfx.diffeqsolve(
        TERM, dfx.Bosh3(), 0.0, T1, T1 / NUM_STEPS, Y0, args, saveat=dfx.SaveAt(ts=TS), max_steps=NUM_STEPS + 1
    ).ys


def check_every_step(ys, args):
    size = np.max(np.abs(ys), axis=0)
    assert np.max(np.abs(one_step_each(ys, args) - ys[1:]) / size) < 1e-13


def test_chaos_is_cut_into_segments_and_every_step_is_right():
    sol = compiled(Y0, CHAOTIC)
    assert sol.result == dfx.RESULTS.successful
    check_every_step(sol.ys, CHAOTIC)
    statistics = pdx.statistics(sol)
    assert int(statistics.split_windows) == 1
    assert 2 <= int(statistics.attempts) <= 12
    assert int(statistics.sequential_steps) <= NUM_STEPS // 10
    assert int(statistics.parallel_steps) + int(statistics.sequential_steps) == NUM_STEPS
    assert float(statistics.residual) < 8 * np.finfo(float).eps
    # About 0.9 per unit of time in the long run.
    assert 0.4 < float(statistics.lyapunov) < 1.4
    # Trajectories agree for as long as rounding takes to grow.
    until = NUM_STEPS // 2
    assert relative_difference(sol.ys[:until], in_sequence(CHAOTIC)[:until]) < 1e-6


def test_a_stable_problem_is_solved_whole_in_as_many_iterations_as_predicted():
    sol = compiled(Y0, STABLE)
    assert sol.result == dfx.RESULTS.successful
    check_every_step(sol.ys, STABLE)
    statistics = pdx.statistics(sol)
    assert (int(statistics.attempts), int(statistics.split_windows), int(statistics.sequential_steps)) == (1, 0, 0)
    assert int(statistics.iterations) <= 4
    assert abs(int(statistics.iterations) - int(statistics.predicted_iterations)) <= 2
    # Perturbations fall like exp(-t).
    assert abs(float(statistics.lyapunov) + 1) < 1e-3
    assert relative_difference(sol.ys, in_sequence(STABLE)) < 1e-12


def test_where_the_field_turns_chaotic_the_stable_half_is_solved_at_once():
    sol = compiled(Y0, JUMP)
    assert sol.result == dfx.RESULTS.successful
    check_every_step(sol.ys, JUMP)
    statistics = pdx.statistics(sol)
    assert int(statistics.parallel_steps) >= NUM_STEPS // 2
    assert int(statistics.attempts) <= 12
    until = NUM_STEPS * 3 // 4
    assert relative_difference(sol.ys[:until], in_sequence(JUMP)[:until]) < 1e-7


def test_what_is_too_unstable_is_made_in_sequence_after_few_attempts():
    sol = compiled(Y0, UNSTABLE)
    assert sol.result == dfx.RESULTS.successful
    check_every_step(sol.ys, UNSTABLE)
    statistics = pdx.statistics(sol)
    assert int(statistics.sequential_windows) == 1
    assert int(statistics.attempts) <= 6
    assert int(statistics.predictor_steps) <= NUM_STEPS // 4


def test_in_a_batch_every_member_does_what_it_does_alone():
    members = [STABLE, CHAOTIC, UNSTABLE, JUMP]
    together = jax.jit(jax.vmap(lambda args: solve(Y0, args)))(jnp.stack(members))
    assert (together.result == dfx.RESULTS.successful).all()
    for k, args in enumerate(members):
        alone = compiled(Y0, args)
        got = jax.tree.map(lambda x, k=k: x[k], (together.ys, pdx.statistics(together)))
        for name in ("attempts", "iterations", "sequential_steps", "parallel_steps"):
            assert int(getattr(got[1], name)) == int(getattr(pdx.statistics(alone), name)), (k, name)
        # Rounding may differ between the two programs, and grows.
        assert relative_difference(got[0][:1000], alone.ys[:1000]) < 1e-9
        check_every_step(got[0], args)


def test_longer_sequences_are_attempted_as_a_whole_and_then_in_parts(monkeypatch):
    monkeypatch.setattr(policy, "_LARGEST_SEGMENT", 512)
    sol = jax.jit(lambda args: solve(Y0, args))(CHAOTIC)
    assert sol.result == dfx.RESULTS.successful
    check_every_step(sol.ys, CHAOTIC)
    assert int(pdx.statistics(sol).attempts) >= 5
    assert int(pdx.statistics(sol).sequential_steps) <= NUM_STEPS // 10
    until = NUM_STEPS // 2
    assert relative_difference(sol.ys[:until], in_sequence(CHAOTIC)[:until]) < 1e-6


SHORT = dfx.SaveAt(t1=True, solver_state=True)


def test_the_strict_rule_makes_every_step_of_a_growing_problem_in_sequence():
    strict = jax.jit(
        lambda args: solve(
            Y0, args, 512, 5.0, SHORT, policy=pdx.AdaptivePolicy(max_exponent=0.0), predictor=pdx.ConstantPredictor()
        )
    )
    growing, falling = pdx.statistics(strict(CHAOTIC)), pdx.statistics(strict(STABLE))
    assert float(growing.lyapunov) > 0
    # One iteration is made to know the growth, and the first step of it is exact.
    assert (int(growing.iterations), int(growing.attempts)) == (1, 1)
    assert int(growing.sequential_steps) >= 510
    assert int(falling.sequential_steps) == 0


def test_sequential_steps_attempt_nothing_and_tell_no_growth():
    options = {"policy": pdx.policies.Sequential(), "predictor": pdx.ConstantPredictor()}
    sol = jax.jit(lambda args: solve(Y0, args, **options))(CHAOTIC)
    assert sol.result == dfx.RESULTS.successful
    check_every_step(sol.ys, CHAOTIC)
    assert (int(pdx.statistics(sol).attempts), int(pdx.statistics(sol).sequential_steps)) == (0, NUM_STEPS)
    assert np.isinf(pdx.statistics(sol).lyapunov)


def test_the_policy_without_sequential_steps_fails_on_chaos():
    sol = jax.jit(lambda args: solve(Y0, args, saveat=SHORT, policy=pdx.policies.ParallelOnly()))(CHAOTIC)
    assert sol.result in (dfx.RESULTS.nonlinear_divergence, dfx.RESULTS.nonlinear_max_steps_reached)


def test_a_recurrence_can_be_solved_under_the_policy_too():
    def logistic(y, x):
        y = 3.9 * y * (1 - y)
        return y, y

    got = pdx.parallel_scan(logistic, jnp.array(0.3), None, 1000, policy=pdx.AdaptivePolicy(min_steps=16))[1]
    want = jax.lax.scan(logistic, jnp.array(0.3), None, 1000)[1]
    # Rounding doubles about every step and a half.
    np.testing.assert_allclose(got[:40], want[:40], atol=1e-6)
    previous = np.concatenate([[0.3], got[:-1]])
    np.testing.assert_allclose(got, 3.9 * previous * (1 - previous), atol=1e-14)


def test_a_limit_on_growth_needs_exact_jacobians():
    with pytest.raises(ValueError, match="exact Jacobians"):
        options = {"root_finder": pdx.ParallelNewton(jacobian=pdx.jacobians.Diagonal())}
        solve(Y0, CHAOTIC, 64, 1.0, SHORT, policy=pdx.AdaptivePolicy(max_exponent=0.0), **options)


@pytest.mark.parametrize("policy", [pdx.policies.Sequential(), pdx.policies.ParallelThenSequential()])
def test_a_progress_meter_moves_within_a_window(policy, capsys):
    solver = parallel_solver(
        dfx.Euler(), 2048, root_find_max_steps=1, predictor=pdx.ConstantPredictor(), policy=policy,
        progress_meter=dfx.TextProgressMeter(0.2),
    )  # fmt: skip
    # From a constant guess one iteration is not enough for anything.
    term = dfx.ODETerm(lambda t, y, args: -(y**3))
    sol = jax.jit(lambda y0: dfx.diffeqsolve(term, solver, 0.0, 4.0, 4.0, y0, max_steps=1))(jnp.ones(1))
    jax.block_until_ready(sol.ys)
    jax.effects_barrier()
    shown = [float(line.rstrip("%")) for line in capsys.readouterr().out.split()]
    assert shown[0] == 0 and shown[-1] == 100 and len(shown) >= 5 and shown == sorted(shown)
