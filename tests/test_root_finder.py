"""`ParallelNewton` solves recurrences under plain Optimistix, reports honestly, and stays finite from any guess."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx
from parallel_diffrax._scan import BidiagonalSolver, SequentialScan


NUM_STEPS = 40


def step(y, w):
    return jnp.tanh(w @ y + 0.3) + 0.1 * y


def residual(y, args):
    w, init = args
    previous = jnp.concatenate([init[None], y[:-1]])
    return jax.vmap(lambda y: step(y, w))(previous) - y


def by_loop(w, init):
    y, out = init, []
    for _ in range(NUM_STEPS):
        y = step(y, w)
        out.append(y)
    return jnp.stack(out)


W = 0.8 * jax.random.normal(jax.random.key(0), (3, 3))
INIT = jnp.array([0.1, -0.2, 0.4])
ARGS = (W, INIT)
GUESS = jnp.zeros((NUM_STEPS, 3))


def solve(guess=GUESS, args=ARGS, root_finder=pdx.ParallelNewton(), **kwargs):
    return optx.root_find(residual, root_finder, guess, args, throw=False, **kwargs)


def test_it_runs_under_optimistix_and_finds_the_trajectory():
    for root_finder in (pdx.ParallelNewton(), pdx.ParallelNewton(scan=SequentialScan())):
        sol = solve(root_finder=root_finder)
        assert sol.result == optx.RESULTS.successful
        assert int(sol.stats["num_steps"]) <= 8
        assert int(sol.stats["report"].num_converged) == NUM_STEPS
        np.testing.assert_allclose(sol.value, by_loop(*ARGS), atol=1e-13)


def test_its_derivative_under_optimistix_is_that_of_the_loop():
    adjoint = optx.ImplicitAdjoint(linear_solver=BidiagonalSolver())
    got = jax.grad(lambda args: jnp.sum(solve(args=args, adjoint=adjoint).value ** 2))(ARGS)
    want = jax.grad(lambda args: jnp.sum(by_loop(*args) ** 2))(ARGS)
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, atol=1e-11)


def test_states_may_be_pytrees():
    def fn(y, args):
        stacked = jnp.concatenate([y["a"], y["b"][:, None]], axis=1)
        r = residual(stacked, args)
        return {"a": r[:, :2], "b": r[:, 2]}

    guess = {"a": GUESS[:, :2], "b": GUESS[:, 2]}
    sol = optx.root_find(fn, pdx.ParallelNewton(), guess, ARGS, throw=False)
    np.testing.assert_allclose(sol.value["b"], by_loop(*ARGS)[:, 2], atol=1e-13)


def test_after_k_iterations_the_first_k_steps_are_exact_from_a_random_guess():
    # A chaotic map: nothing but exactness of the leading steps makes progress here.
    def logistic(y, _):
        previous = jnp.concatenate([jnp.array([[0.2]]), y[:-1]])
        return 3.9 * previous * (1 - previous) - y

    want, y = [], 0.2
    for _ in range(NUM_STEPS):
        y = 3.9 * y * (1 - y)
        want.append(y)
    guess = jax.random.uniform(jax.random.key(1), (NUM_STEPS, 1))
    for k in (1, 2, 5, 9):
        sol = optx.root_find(logistic, pdx.ParallelNewton(), guess, max_steps=k, throw=False)
        assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
        np.testing.assert_allclose(sol.value[:k, 0], want[:k], rtol=1e-10)
        assert int(sol.stats["report"].num_converged) <= NUM_STEPS


def test_too_few_iterations_are_reported():
    sol = solve(max_steps=1)
    assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
    with pytest.raises(RuntimeError):
        optx.root_find(residual, pdx.ParallelNewton(), GUESS, ARGS, max_steps=1)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_function_that_is_not_finite_is_never_a_success_and_the_part_before_is_right(bad):
    def fn(y, args):
        r = residual(y, args)
        return jnp.where(jnp.arange(NUM_STEPS)[:, None] >= 25, bad, r)

    sol = optx.root_find(fn, pdx.ParallelNewton(), GUESS, ARGS, throw=False)
    assert sol.result != optx.RESULTS.successful
    assert int(sol.stats["report"].num_converged) == 25
    np.testing.assert_allclose(sol.value[:25], by_loop(*ARGS)[:25], atol=1e-12)
    assert np.isfinite(sol.value).all()


def test_a_wild_guess_does_not_loosen_the_tolerance():
    # What counts as small is measured against the iterate, not against a guess of 1e200.
    for scale in (1e8, 1e200):
        sol = solve(guess=scale * jax.random.normal(jax.random.key(2), GUESS.shape))
        if bool(sol.result == optx.RESULTS.successful):
            np.testing.assert_allclose(sol.value, by_loop(*ARGS), atol=1e-10)
        assert np.isfinite(sol.value).all()


def test_every_iterate_is_finite_where_the_linearisation_overflows():
    def squares(y, _):
        previous = jnp.concatenate([jnp.array([[0.9]]), y[:-1]])
        return previous**2 + 0.05 - y

    guess = jnp.full((200, 1), 30.0)
    for k in (1, 2, 3, 11):
        sol = optx.root_find(squares, pdx.ParallelNewton(), guess, max_steps=k, throw=False)
        assert np.isfinite(sol.value).all()


def test_float32_that_drifts_by_less_than_rounding_per_step_is_not_called_solved_too_early():
    # 2^17 steps of 3e-7 from 1: each is three roundings, together they are 5 %.
    increment = np.float32(3e-7)
    num_steps = 2**17

    def drift(y, _):
        previous = jnp.concatenate([jnp.ones((1, 1), jnp.float32), y[:-1]])
        return previous + increment - y

    sol = optx.root_find(drift, pdx.ParallelNewton(), jnp.ones((num_steps, 1), jnp.float32), throw=False)
    assert sol.result == optx.RESULTS.successful
    in_sequence, _ = jax.lax.scan(lambda y, _: (y + increment, None), jnp.ones((), jnp.float32), None, length=num_steps)
    assert float(in_sequence) > 1.04
    np.testing.assert_allclose(sol.value[-1, 0], in_sequence, rtol=1e-6)


def test_what_is_not_a_recurrence_residual_is_refused_with_a_sentence():
    for fn, guess in [
        (lambda y, _: y[:-1], GUESS),
        (lambda y, _: y, jnp.array(1.0)),
        (lambda y, _: y, jnp.zeros((0, 2))),
        (lambda y, _: {"a": y}, GUESS),
    ]:
        with pytest.raises(ValueError, match="residuals of recurrences"):
            optx.root_find(fn, pdx.ParallelNewton(), guess)
