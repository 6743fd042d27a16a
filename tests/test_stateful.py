"""Solvers with a state of their own, and noise: the values and derivatives of sequential Diffrax, window by window."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, only_full, parallel_solver, relative_difference


T1, NUM_STEPS = 6.0, 120
TS = jnp.linspace(0.3, T1, 7)


def jumping(t, y, args):
    return DRIVEN.vector_field(t, y, args) + jnp.where(t < 2.0, 0.0, 1.0)


def solve(solver, step, y0, args, **options):
    saveat = dfx.SaveAt(ts=TS, t1=True, solver_state=True)
    return dfx.diffeqsolve(dfx.ODETerm(jumping), solver, 0.0, T1, step, y0, args, saveat=saveat, **options)


def both(base, predictor):
    """In three windows, and in sequence: the solution and the derivative of its sum."""

    def run(solver, step, max_steps, y0, args):
        sol = solve(solver, step, y0, args, max_steps=max_steps)
        return jnp.sum(jnp.sin(sol.ys)), sol

    parallel = parallel_solver(base, NUM_STEPS // 3, predictor=predictor, policy=pdx.policies.ParallelOnly())
    runs = ((parallel, T1 / 3, 3), (base, T1 / NUM_STEPS, NUM_STEPS + 1))
    return [
        eqx.filter_jit(jax.value_and_grad(lambda y, a, run_=r: run(*run_, y, a), (0, 1), has_aux=True))(
            DRIVEN_Y0, DRIVEN_ARGS
        )
        for r in runs
    ]


@pytest.mark.parametrize(
    "base, predictor",
    only_full((dfx.LeapfrogMidpoint(), pdx.CoarsePredictor()), (dfx.ReversibleHeun(), pdx.ConstantPredictor())),
    ids=["LeapfrogMidpoint", "ReversibleHeun"],
)
def test_a_solvers_own_state_is_carried_from_step_to_step_and_window_to_window(base, predictor):
    ((_, got), gradient), ((_, want), expected) = both(base, predictor)
    assert relative_difference(got.ys, want.ys) < 1e-12
    for a, b in zip(gradient, expected):
        assert relative_difference(a, b) < 1e-10
    statistics = pdx.statistics(got)
    assert int(statistics.parallel_steps) == NUM_STEPS
    for a, b in zip(jax.tree.leaves(got.solver_state.base_state), jax.tree.leaves(want.solver_state)):
        np.testing.assert_allclose(a, b, rtol=1e-11)
    assert "base_state" not in str(statistics)


def test_a_jump_before_the_first_step_is_told_to_the_solver():
    """A solve in two parts, the second of which goes on with the solver's state, after a jump of the field."""

    def run(solver, step):
        saveat = dfx.SaveAt(t1=True, solver_state=True)

        @eqx.filter_jit
        def part(t0, y0, state, made_jump):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(jumping), solver, t0, t0 + 2.0, step, y0, DRIVEN_ARGS, saveat=saveat, solver_state=state,
                made_jump=made_jump,
            )  # fmt: skip
            return sol.ys[-1], sol.solver_state

        zero, two = jnp.array(0.0), jnp.array(2.0)
        first = solver.init(dfx.ODETerm(jumping), zero, two, DRIVEN_Y0, DRIVEN_ARGS)
        y, state = part(zero, DRIVEN_Y0, first, jnp.array(False))
        return jnp.stack([part(two, y, state, jnp.array(jump))[0] for jump in (True, False)])

    base = dfx.ReversibleHeun()
    options = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}
    got, want = run(parallel_solver(base, 20, **options), 2.0), run(base, 0.1)
    assert relative_difference(got, want) < 1e-12
    assert np.max(np.abs(want[0] - want[1])) > 1e-3


def test_a_state_that_is_not_made_of_floating_point_numbers_is_refused():
    class Counting(dfx.Euler):
        def init(self, terms, t0, t1, y0, args):
            return jnp.array(0)

        def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
            y1, *rest = super().step(terms, t0, t1, y0, args, None, made_jump)
            return y1, rest[0], rest[1], solver_state + 1, rest[3]

    with pytest.raises(ValueError, match=r"Counting.*dtype int"):
        dfx.diffeqsolve(DRIVEN, parallel_solver(Counting(), 8), 0.0, 1.0, 1.0, DRIVEN_Y0, DRIVEN_ARGS)
    with pytest.raises(ValueError, match=r"LeapfrogMidpoint.*depends on more"):
        pdx.lyapunov_exponent(DRIVEN, dfx.LeapfrogMidpoint(), 0.0, 1.0, DRIVEN_Y0, DRIVEN_ARGS, num_steps=8)


def brownian(**key):
    return dfx.VirtualBrownianTree(0.0, 1.0, tol=1e-3, shape=(2,), key=jax.random.key(3, **key))


def noisy(path):
    noise = dfx.ControlTerm(lambda t, y, args: 0.3 * args[0] * jnp.diag(jnp.cos(y)), path)
    return dfx.MultiTerm(DRIVEN, noise)


def test_a_path_with_noise_and_its_gradient_are_those_of_sequential_diffrax():
    """One path, in two windows."""

    def run(solver, step, adjoint, args):
        sol = dfx.diffeqsolve(
            noisy(brownian()), solver, 0.0, 1.0, step, DRIVEN_Y0, args, saveat=dfx.SaveAt(t1=True, solver_state=True),
            adjoint=adjoint, max_steps=128,
        )  # fmt: skip
        return jnp.sum(sol.ys**2), (sol.ys, sol.solver_state)

    parallel = parallel_solver(
        dfx.EulerHeun(), 64, predictor=pdx.ConstantPredictor(), policy=pdx.policies.ParallelOnly()
    )

    def derivative(mode, *options):
        return jax.jit(mode(functools.partial(run, *options), has_aux=True))(DRIVEN_ARGS)

    gradient, (got, state) = derivative(jax.grad, parallel, 0.5, dfx.RecursiveCheckpointAdjoint())
    # In forward mode, which makes the path, by far the most to compile, half as often.
    expected, (want, _) = derivative(jax.jacfwd, dfx.EulerHeun(), 1 / 128, dfx.ForwardMode())
    assert relative_difference(got, want) < 1e-12
    assert relative_difference(gradient, expected) < 1e-10
    assert int(state.statistics.parallel_steps) == 128


def test_random_keys_whose_numbers_depend_on_the_batch_are_refused():
    for impl in ("rbg", "unsafe_rbg"):
        with pytest.raises(ValueError, match=f"generator '{impl}'"):
            dfx.diffeqsolve(
                noisy(brownian(impl=impl)), parallel_solver(dfx.EulerHeun(), 8), 0.0, 1.0, 1.0, DRIVEN_Y0, DRIVEN_ARGS
            )


def test_half_solver_gives_error_estimates_to_solvers_that_have_none():
    base = dfx.HalfSolver(dfx.Euler())
    controller = dfx.PIDController(rtol=1e-2, atol=1e-3)
    saveat = dfx.SaveAt(t1=True, dense=True)
    parallel = parallel_solver(base, 32, predictor=pdx.ConstantPredictor(), policy=pdx.policies.ParallelOnly())
    sol = dfx.diffeqsolve(
        DRIVEN, parallel, 0.0, T1, 1.0, DRIVEN_Y0, DRIVEN_ARGS, saveat=saveat, stepsize_controller=controller,
        max_steps=64,
    )  # fmt: skip
    # The windows that the controller chose, in sequence.
    ts = sol.interpolation.infos["steps"].ts[: int(sol.stats["num_accepted_steps"])]
    grid = jnp.concatenate([ts[:, :-1].ravel(), ts[-1, -1:]])
    want = dfx.diffeqsolve(
        DRIVEN, base, 0.0, T1, None, DRIVEN_Y0, DRIVEN_ARGS, stepsize_controller=dfx.StepTo(grid), max_steps=len(grid)
    )
    assert relative_difference(sol.ys, want.ys) < 1e-11
    assert len(ts) > 1


def test_a_failed_solve_of_a_field_that_closes_over_its_parameter_has_a_nan_derivative_and_raises_nothing():
    def end(rate):
        term = dfx.ODETerm(lambda t, y, args: jnp.where(t > 0.5, jnp.nan, -rate * y))
        solver = pdx.ParallelSolver(dfx.LeapfrogMidpoint(), 8, policy=pdx.policies.ParallelThenSequential())
        return dfx.diffeqsolve(term, solver, 0.0, 1.0, 1.0, jnp.ones(1), throw=False, adjoint=dfx.ForwardMode()).ys[
            0, 0
        ]

    assert np.isnan(jax.jit(lambda rate: jax.jvp(end, (rate,), (jnp.ones_like(rate),))[1])(jnp.array(1.0)))
