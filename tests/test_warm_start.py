"""A solve that begins with the trajectory of the one before finds the same solution in fewer iterations, without a step in
sequence; a trajectory that is of no use, unknown, or of another problem does no harm."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, parallel_solver, relative_difference


T1, NUM_STEPS = 20.0, 256
SAVED = dfx.SaveAt(t1=True, solver_state=True)


def solver_of(windows, policy=pdx.AdaptivePolicy()):
    predictor = pdx.WarmStart(num_windows=2 if windows == 4 else 1)
    return parallel_solver(dfx.Bosh3(), NUM_STEPS // windows, predictor=predictor, policy=policy)


def start(windows, y0=DRIVEN_Y0):
    return solver_of(windows).init(DRIVEN, 0.0, T1, y0, None)


TRACES = []


@functools.partial(jax.jit, static_argnames="windows")
def solve(args, state, windows=1, y0=DRIVEN_Y0):
    TRACES.append(windows)
    solver = solver_of(windows, pdx.AdaptivePolicy() if windows == 1 else pdx.policies.ParallelOnly())
    return dfx.diffeqsolve(
        DRIVEN, solver, 0.0, T1, T1 / NUM_STEPS, y0, args, stepsize_controller=pdx.Windows(), saveat=SAVED,
        solver_state=state, max_steps=windows, throw=False,
    )  # fmt: skip


@jax.jit
def sequential(args):
    return dfx.diffeqsolve(DRIVEN, dfx.Bosh3(), 0.0, T1, T1 / NUM_STEPS, DRIVEN_Y0, args).ys


def with_trajectory(state, trajectory):
    return eqx.tree_at(lambda state: state.trajectory, state, trajectory)


def counts(state):
    found = state.statistics
    return int(found.windows), int(found.iterations), int(found.predictor_steps), int(found.sequential_steps)


def test_a_known_trajectory_saves_iterations_and_the_first_guess():
    first = solve(DRIVEN_ARGS, start(1))
    _, cold, steps, _ = counts(first.solver_state)
    assert cold >= 3 and steps > 0
    assert first.solver_state.trajectory.shape == (1, NUM_STEPS, 2)
    np.testing.assert_array_equal(first.solver_state.trajectory[0, -1], first.ys[-1])

    # The same problem: nothing is left to do but to see that. A nearby one: few iterations.
    again = solve(DRIVEN_ARGS, first.solver_state)
    assert counts(again.solver_state) == (1, 1, 0, 0)
    near = solve(1.0001 * DRIVEN_ARGS, again.solver_state)
    assert counts(near.solver_state)[1] < cold and counts(near.solver_state)[2:] == (0, 0)
    # Far away the trajectory is no guess: the inner predictor's is.
    far = solve(1.7 * DRIVEN_ARGS, near.solver_state)
    assert counts(far.solver_state)[2] > 0
    for sol, factor in ((first, 1.0), (again, 1.0), (near, 1.0001), (far, 1.7)):
        assert sol.result == dfx.RESULTS.successful
        assert relative_difference(sol.ys, sequential(factor * DRIVEN_ARGS)) < 1e-11
    # The duration is of this solve. One program served for all.
    assert float(pdx.statistics(far).duration) == T1
    assert TRACES.count(1) == 1


def test_a_trajectory_that_is_partly_nan_or_nonsense_is_not_used():
    state = solve(DRIVEN_ARGS, start(1)).solver_state
    garbage = 1e3 * jax.random.normal(jax.random.key(0), state.trajectory.shape)
    for trajectory in (state.trajectory.at[0, 77, 1].set(jnp.nan), garbage, jnp.full_like(garbage, jnp.inf)):
        sol = solve(DRIVEN_ARGS, with_trajectory(state, trajectory))
        assert sol.result == dfx.RESULTS.successful
        assert relative_difference(sol.ys, sequential(DRIVEN_ARGS)) < 1e-11
        assert counts(sol.solver_state)[2] > 0 and np.isfinite(sol.solver_state.trajectory).all()


def test_a_solve_that_fails_hands_nothing_on_and_the_next_recovers():
    state = solve(DRIVEN_ARGS, start(1)).solver_state
    failed = solve(jnp.full(2, jnp.nan), state)
    assert failed.result != dfx.RESULTS.successful
    assert np.isinf(failed.solver_state.trajectory).all()
    recovered = solve(DRIVEN_ARGS, failed.solver_state)
    assert recovered.result == dfx.RESULTS.successful
    assert relative_difference(recovered.ys, sequential(DRIVEN_ARGS)) < 1e-11


def test_of_several_windows_the_first_ones_are_remembered():
    first = solve(DRIVEN_ARGS, start(4), windows=4)
    again = solve(DRIVEN_ARGS, first.solver_state, windows=4)
    assert first.result == again.result == dfx.RESULTS.successful
    for sol in (first, again):
        assert counts(sol.solver_state)[0] == 4
        assert relative_difference(sol.ys, sequential(DRIVEN_ARGS)) < 1e-11
    trajectory = np.asarray(again.solver_state.trajectory)
    assert trajectory.shape == (2, NUM_STEPS // 4, 2)
    np.testing.assert_allclose(trajectory[0], solve(DRIVEN_ARGS, start(1)).solver_state.trajectory[0, :64], rtol=1e-11)
    # Two of four windows take no steps for a guess.
    assert counts(again.solver_state)[2] * 2 == counts(first.solver_state)[2]


@pytest.mark.full
def test_members_of_a_batch_keep_their_own_and_the_gradient_is_that_of_the_solution():
    args = jnp.stack([DRIVEN_ARGS, 1.1 * DRIVEN_ARGS, 0.8 * DRIVEN_ARGS])
    states = jax.vmap(functools.partial(start, 1))(jnp.broadcast_to(DRIVEN_Y0, (3, 2)))

    @jax.jit
    def loss(args, states):
        sols = jax.vmap(solve)(args, states)
        return jnp.sum(jnp.sin(sols.ys)), sols.solver_state

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    cold, states = gradient(args, states)
    assert (np.asarray(states.statistics.predictor_steps) > 0).all()
    warm, states = gradient(args, states)
    assert (np.asarray(states.statistics.predictor_steps) == 0).all()
    assert (np.asarray(states.statistics.iterations) == 1).all()
    want = jax.grad(lambda args: jnp.sum(jnp.sin(jax.vmap(sequential)(args))))(args)
    assert relative_difference(cold, want) < 1e-9
    assert relative_difference(warm, want) < 1e-9
    # Where one member knows nothing, it alone is guessed anew.
    forgotten = with_trajectory(states, states.trajectory.at[1].set(jnp.nan))
    _, states = gradient(args, forgotten)
    assert [steps > 0 for steps in states.statistics.predictor_steps.tolist()] == [False, True, False]


def test_states_of_other_solvers_are_refused_with_a_reason():
    solver = solver_of(1)
    plain = parallel_solver(dfx.Bosh3(), NUM_STEPS)

    def try_state(solver, state):
        jax.eval_shape(
            lambda state: (
                dfx.diffeqsolve(DRIVEN, solver, 0.0, T1, T1, DRIVEN_Y0, DRIVEN_ARGS, solver_state=state, max_steps=1).ys
            ),
            state,
        )

    with pytest.raises(ValueError, match="keeps a trajectory of shape"):
        try_state(solver, plain.init(DRIVEN, 0.0, T1, DRIVEN_Y0, None))
    with pytest.raises(ValueError, match="keeps a trajectory of shape"):
        try_state(plain, solver.init(DRIVEN, 0.0, T1, DRIVEN_Y0, None))
    with pytest.raises(TypeError, match="solver_state"):
        try_state(solver, jnp.zeros(3))
