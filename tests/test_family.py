"""Every Jacobian approximation builds what it says, and under either root finder success means the sequential answer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx
from benchmarks import recurrences
from benchmarks.family import memory, solve
from parallel_diffrax._scan import SequentialScan


SCAN = SequentialScan()
KEY = jax.random.key(0)
APPROXIMATIONS = {
    "Dense": pdx.jacobians.Dense(),
    "BlockDiagonal": pdx.jacobians.BlockDiagonal.of_parts(4),
    "Diagonal": pdx.jacobians.Diagonal(),
    "Hutchinson": pdx.jacobians.Hutchinson(4, KEY),
    "Clipped": pdx.jacobians.Clipped(),
    "Scaled": pdx.jacobians.Scaled(0.1),
    "Identity": pdx.jacobians.Identity(),
    "Zero": pdx.jacobians.Zero(),
}


def run(problem, root_finder, max_steps=200):
    """The solution, after the check that a success is the sequential answer and that every number is finite."""
    sol = solve(problem.residual, root_finder, problem.init, problem.xs, max_steps)
    assert np.isfinite(sol.value).all()
    succeeded = bool(sol.result == optx.RESULTS.successful)
    if succeeded:
        want = problem.sequential()
        np.testing.assert_allclose(sol.value, want, rtol=1e-8, atol=1e-8)
    return succeeded, int(sol.stats["num_steps"]), int(sol.stats["report"].num_converged)


NETWORK = recurrences.mlp(150, 4)
COUPLED = lambda y, x: jnp.tanh(jnp.asarray([[0.5, 1, 0, 2], [0, -1, 3, 0], [1, 0, 0.2, 0], [0.3, 0, 0, 2]]) @ y) + x


def linearised(jacobian, num_steps=5):
    xs = jax.random.normal(KEY, (num_steps, 4))
    y = jax.random.normal(jax.random.key(1), (num_steps, 4))

    def residual(y):
        return jax.vmap(COUPLED)(jnp.concatenate([jnp.ones((1, 4)), y[:-1]]), xs) - y, None

    r, transitions, _ = jax.jit(lambda y: jacobian.linearise(residual, y))(y)
    np.testing.assert_array_equal(r, residual(y)[0])
    previous = jnp.concatenate([jnp.ones((1, 4)), y[:-1]])
    return np.asarray(transitions.dense())[1:], np.asarray(jax.vmap(jax.jacfwd(COUPLED))(previous, xs))[1:]


def test_each_approximation_is_the_part_of_the_jacobian_that_it_names():
    eye = np.eye(4)
    for jacobian, part in [
        (pdx.jacobians.Dense(), lambda A: A),
        (pdx.jacobians.Diagonal(), lambda A: A * eye),
        (pdx.jacobians.BlockDiagonal([(0, 3), (2, 1)]), lambda A: A * (eye + eye[[3, 2, 1, 0]])),
        (pdx.jacobians.BlockDiagonal.of_parts(4), lambda A: A * (eye + eye[[2, 3, 0, 1]])),
        (pdx.jacobians.Identity(), lambda A: 0 * A + eye),
        (pdx.jacobians.Zero(), lambda A: 0 * A),
        (pdx.jacobians.Scaled(0.25), lambda A: 0.75 * A),
        (pdx.jacobians.Scaled(0.25, pdx.jacobians.Identity()), lambda A: 0 * A + 0.75 * eye),
        (pdx.jacobians.Clipped(limit=0.5), lambda A: np.clip(A, -0.5, 0.5) * eye),
        (pdx.jacobians.Clipped(pdx.jacobians.Dense()), lambda A: np.where(eye == 1, np.clip(A, -1, 1), A)),
    ]:
        got, A = linearised(jacobian)
        np.testing.assert_allclose(got, part(A), atol=1e-14)


def test_hutchinsons_estimate_is_unbiased_and_reproducible():
    few, A = linearised(pdx.jacobians.Hutchinson(2, KEY))
    np.testing.assert_array_equal(few, linearised(pdx.jacobians.Hutchinson(2, KEY))[0])
    many, _ = linearised(pdx.jacobians.Hutchinson(20_000, KEY))
    # The standard deviation of an entry is that of its row's other entries over the root of the number of probes.
    np.testing.assert_allclose(many, A * np.eye(4), atol=5 * 4 / np.sqrt(20_000))
    assert np.max(np.abs(few - A * np.eye(4))) > 0.1


@pytest.mark.parametrize("finder", [pdx.ParallelNewton, pdx.ELK])
def test_every_approximation_finds_the_sequential_answer_of_a_contracting_recurrence(finder):
    counts = {}
    # All of them under both root finders, on larger problems: `benchmarks/results/family.json`.
    names = APPROXIMATIONS if finder is pdx.ParallelNewton else ("Dense", "Diagonal", "Zero")
    for name in names:
        jacobian = APPROXIMATIONS[name]
        succeeded, counts[name], _ = run(NETWORK, finder(jacobian=jacobian, scan=SCAN))
        assert succeeded, name
    assert counts["Dense"] <= 6
    assert counts["Dense"] < counts["Diagonal"] < counts["Zero"]


def test_blocks_of_positions_and_velocities_solve_oscillators_as_newton_does():
    problem = recurrences.oscillator(300, 6)
    for finder in (pdx.ParallelNewton, pdx.ELK):
        succeeded, iterations, _ = run(problem, finder(jacobian=pdx.jacobians.BlockDiagonal.of_parts(6), scan=SCAN))
        assert succeeded and iterations <= 6
    # Without them information is lost at every step, and is not taken for an answer.
    assert not run(problem, pdx.ParallelNewton(jacobian=pdx.jacobians.Diagonal(), scan=SCAN), 50)[0]


def test_newton_takes_at_most_6_iterations_on_contracting_recurrences_and_40_on_a_langevin_chain():
    for problem, most in [(recurrences.mlp(), 6), (recurrences.gru(1000, 8), 6), (recurrences.langevin(), 40)]:
        succeeded, iterations, _ = run(problem, pdx.ParallelNewton(scan=SCAN))
        assert succeeded and iterations <= most


# At most as many as plain filtering with the best fixed damping (`benchmarks/results/family.json`); where Newton's
# method needs 7, it is two more.
@pytest.mark.parametrize(
    "name, most", [("unstable GRU", 17), ("tanh, N = 60", 9), ("tanh, N = 2000", 10), ("van der Pol", 49)]
)
def test_elk_converges_from_a_constant_guess_where_newton_overflows(name, most):
    succeeded, iterations, converged = run(recurrences.UNSTABLE[name](), pdx.ELK(scan=SCAN))
    assert succeeded and iterations <= most and converged > 0


def iterates(problem, root_finder, count):
    """The states and root finder states of `count` iterations, one at a time."""
    fn = lambda y, args: (problem.residual(y, args), None)
    args = (problem.init, problem.xs)
    y = jnp.broadcast_to(problem.init, (problem.xs.shape[0], problem.init.size))
    state = root_finder.init(fn, y, args, {}, jax.eval_shape(lambda: y), None, frozenset())
    step = eqx.filter_jit(lambda y, state: root_finder.step(fn, y, args, {}, state, frozenset())[:2])
    out = [y]
    for _ in range(count):
        y, state = step(y, state)
        out.append(y)
    return jnp.stack(out)


def test_the_merit_never_rises_under_the_smoother_and_the_last_errors_fall_quadratically():
    problem = recurrences.gru(300, 3, 3.0)
    ys = iterates(problem, pdx.ELK(estimator=pdx.damping.KalmanSmoother(), scan=SCAN), 25)
    residual = jax.vmap(lambda y: problem.residual(y, (problem.init, problem.xs)))
    merits = np.sum(np.square(residual(ys)), axis=(1, 2))
    floor = 1e-26
    assert (merits[1:] <= np.maximum(merits[:-1], floor)).all()
    errors = np.max(np.abs(ys - problem.sequential()[None]), axis=(1, 2))
    last = int(np.argmax(errors < 1e-13))
    assert last >= 4
    # e[k + 1] <= C e[k]^2 with a moderate constant, down to rounding.
    for k in (last - 3, last - 2, last - 1):
        assert errors[k + 1] <= max(100 * errors[k] ** 2, 1e-13)


@pytest.mark.parametrize(
    "root_finder",
    [pdx.ELK(scan=SCAN), pdx.ELK(damping=pdx.damping.FixedDamping(0.1), scan=SCAN)],
    ids=["adaptive", "fixed"],
)
def test_after_k_iterations_of_the_filter_the_first_k_steps_are_exact_and_all_are_finite(root_finder):
    # A chaotic map from a constant guess: nothing but exactness of the leading steps makes sure progress.
    xs = jnp.zeros((60, 0))
    problem = recurrences.Problem(lambda y, x: 3.9 * y * (1 - y), jnp.array([0.2]), xs)
    ys = iterates(problem, root_finder, 12)
    assert np.isfinite(ys).all()
    want = problem.sequential()
    for k in range(1, 13):
        np.testing.assert_allclose(ys[k, :k], want[:k], rtol=1e-9)


def test_a_step_that_cannot_be_evaluated_stops_elk_with_the_part_before_right():
    index = jnp.arange(40.0)[:, None]
    bad = recurrences.Problem(
        lambda y, x: jnp.where(x >= 25, jnp.nan, jnp.tanh(0.9 * y + x / 40)), jnp.array([0.1]), index
    )
    for estimator in (pdx.damping.KalmanFilter(), pdx.damping.KalmanSmoother()):
        succeeded, iterations, converged = run(bad, pdx.ELK(estimator=estimator, scan=SCAN), 100)
        assert not succeeded and iterations < 100 and converged == 25


def test_an_update_that_is_small_because_little_is_carried_is_not_convergence():
    # Jacobi moves every state by the increment of 1e-9 per iteration: small each time, 1e-5 in all.
    xs = jnp.zeros((10_000, 0))
    drift = recurrences.Problem(lambda y, x: y + 1e-9, jnp.array([1.0]), xs)
    for finder in (pdx.ParallelNewton, pdx.ELK):
        assert not run(drift, finder(jacobian=pdx.jacobians.Zero(), scan=SCAN), 50)[0]
    # The same, growing along the way.
    grown = recurrences.Problem(lambda y, x: 1.001 * y + 1e-12, jnp.array([0.0]), xs)
    run(grown, pdx.ParallelNewton(jacobian=pdx.jacobians.Scaled(0.0005), scan=SCAN, atol=1e-9), 200)


def test_diagonal_forms_stay_below_twelve_arrays_of_the_size_of_the_solution():
    rows = memory({"Diagonal": pdx.jacobians.Diagonal()}, SCAN)
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["temporary arrays of N x D"] < 12, row


def test_a_history_shows_linear_convergence_at_the_predicted_rate():
    step = lambda y, x: (0.9 * y + 0.02 * jnp.sin(jnp.flip(y)) + x, None)
    xs = 0.3 * jax.random.normal(KEY, (60, 2))
    history = lambda jacobian: pdx.diagnostics.convergence_history(
        step, jnp.zeros(2), xs, root_finder=pdx.ParallelNewton(jacobian=jacobian, scan=SCAN), num_iterations=12
    )
    quasi, jacobi = history(pdx.jacobians.Diagonal()), history(pdx.jacobians.Zero())
    for h, last in ((quasi, 6), (jacobi, 12)):
        # The linear theory holds near the solution.
        np.testing.assert_allclose(h.measured_rate[3:last], h.predicted_rate[3:last], rtol=0.02)
        assert (h.predicted_rate <= 1.001 * h.rate_bound).all() and float(h.rate_bound) < 1
    for k in range(1, 12):
        assert np.max(jacobi.residual[k, :k]) < 1e-15 < np.min(jacobi.residual[k, k + 1 :])


def test_wrong_arguments_are_refused_with_a_sentence():
    for make, kind, match in [
        (lambda: pdx.jacobians.BlockDiagonal([(0, 1), (1, 2)]), ValueError, "name each"),
        (lambda: pdx.jacobians.BlockDiagonal([(0, 1), (2,)]), ValueError, "equal length"),
        (lambda: pdx.jacobians.BlockDiagonal.of_parts(5), ValueError, "must divide"),
        (lambda: pdx.jacobians.Hutchinson(0, KEY), ValueError, "at least 1"),
        (lambda: pdx.jacobians.Scaled(1.5), ValueError, "between 0 and 1"),
        (lambda: pdx.jacobians.Scaled(0.5, 3), TypeError, "AbstractJacobian|Type-check"),
        (lambda: pdx.jacobians.Clipped(limit=0.0), ValueError, "positive"),
        (lambda: pdx.damping.FixedDamping(-1.0), ValueError, "at least 0"),
        (lambda: pdx.damping.AdaptiveDamping(float("nan")), ValueError, "positive"),
        (lambda: pdx.damping.AdaptiveDamping(low=1.0), ValueError, "below"),
        (lambda: pdx.ELK(damping=0.1), TypeError, "AdaptiveDamping|Type-check"),
        (lambda: pdx.ELK(estimator=pdx.jacobians.Dense()), TypeError, "KalmanFilter|Type-check"),
        (lambda: pdx.ELK(rtol=2.0), ValueError, "accepts anything"),
        (lambda: run(NETWORK, pdx.ELK(jacobian=pdx.jacobians.BlockDiagonal.of_parts(6))), ValueError, "6 components"),
        (
            lambda: pdx.diagnostics.convergence_history(COUPLED, 1.0, jnp.ones(3), root_finder=optx.Newton(1e-3, 1e-3)),
            TypeError,
            "convergence_history|Type-check",
        ),
    ]:
        with pytest.raises(kind, match=match):
            make()
