"""Guesses by Newton's method on coarse grids need few steps in sequence, and are replaced where they fail."""

import itertools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

import parallel_diffrax as pdx

from .problems import parallel_solver


def lorenz(t, y, args):
    x, v, z = y
    return args * jnp.stack([10 * (v - x), x * (28 - z) - v, x * v - 8 / 3 * z])


def solve(predictor, num_steps=1000):
    solver = parallel_solver(dfx.Bosh3(), num_steps, predictor=predictor, policy=pdx.policies.ParallelOnly())

    @jax.jit
    def run(y0, speed):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lorenz), solver, 0.0, 3.0, 3.0, y0, speed,
            saveat=dfx.SaveAt(t1=True, solver_state=True), max_steps=1, throw=False,
        )  # fmt: skip
        return sol.ys[-1], sol.result == dfx.RESULTS.successful, pdx.statistics(sol)

    return run


def test_grids_are_refined_by_at_most_eight_and_the_last_is_not_the_fine_one():
    for num_steps in (7, 1000, 4096, 16384, 262144, 10**7):
        for first in (None, 1, 100):
            strides = pdx.predictors.MultilevelPredictor(first).strides(num_steps)
            assert all(stride > 1 for stride in strides)
            finer = [*strides, 1]
            assert all(a > b and a <= 8.5 * b + 4 for a, b in itertools.pairwise(finer))
            if strides:
                made = -(-num_steps // strides[0])
                assert made <= (first or max(1, min(num_steps // 16, 512)))
    assert pdx.predictors.MultilevelPredictor().strides(262144) == [512, 64, 8]


def test_few_large_steps_in_sequence_make_a_good_guess_and_where_they_do_not_the_other_predictor_does():
    y0 = jnp.array([1.0, 1.0, 1.0])
    want, _, coarse = solve(pdx.CoarsePredictor())(y0, 1.0)
    run = solve(pdx.predictors.MultilevelPredictor(num_steps=64))
    got, success, state = run(y0, 1.0)
    assert success and int(state.predictor_steps) == 63 and int(state.iterations) <= 3
    np.testing.assert_allclose(got, want, rtol=1e-9)
    # Ten times as fast, the large steps are unstable.
    got, success, state = run(y0, 10.0)
    assert int(state.predictor_steps) > 100
    want, converged, coarse = solve(pdx.CoarsePredictor())(y0, 10.0)
    assert bool(success) == bool(converged) and int(state.iterations) == int(coarse.iterations)
