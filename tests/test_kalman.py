"""The Kalman scans agree with the textbook: elements form a monoid; filter and smoother equal the sequential ones and the
normal equations of Levenberg-Marquardt, for every structure of `A`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel_diffrax._scan import (
    _kalman,
    AssociativeScan,
    BlockDiagonalTransitions,
    DenseTransitions,
    DiagonalTransitions,
    kalman_filter,
    kalman_smoother,
    SequentialScan,
)

from .test_linear_scan import bidiagonal_matrix


SCANS = [SequentialScan(), AssociativeScan()]


def make(num_steps, size, seed=0, growth=1.1):
    rng = np.random.default_rng(seed)
    A = growth * rng.normal(size=(num_steps, size, size)) / np.sqrt(size)
    return A, rng.normal(size=(num_steps, size)), 10.0 ** rng.uniform(-6, 1, size=num_steps)


def textbook(A, r, damping):
    """The sequential filter and the Rauch-Tung-Striebel smoother in covariance form."""
    num_steps, size = r.shape
    eye = np.eye(size)
    mean, P = np.zeros(size), np.zeros((size, size))
    means, covariances, predicted = [], [], []
    for i in range(num_steps):
        m = r[i] + (A[i] @ mean if i > 0 else 0)
        S = eye + (A[i] @ P @ A[i].T if i > 0 else 0)
        predicted.append((m, S))
        gain = S @ np.linalg.inv(S + eye / damping[i])
        mean, P = m - gain @ m, S - gain @ S
        means.append(mean)
        covariances.append(P)
    smoothed = [means[-1]]
    for i in reversed(range(num_steps - 1)):
        m, S = predicted[i + 1]
        smoothed.append(means[i] + covariances[i] @ A[i + 1].T @ np.linalg.solve(S, smoothed[-1] - m))
    return np.stack(means), np.stack(covariances), np.stack(smoothed[::-1])


def normal_equations(A, r, damping):
    L = bidiagonal_matrix(A)
    matrix = L.T @ L + np.diag(np.repeat(damping, r.shape[1]))
    return np.linalg.solve(matrix, L.T @ r.ravel()).reshape(r.shape)


def assert_close(got, want, tolerance=1e-10):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.max(np.abs(want))))


@partial(jax.jit, static_argnums=3)
def both(transitions, r, damping, scan):
    return *kalman_filter(transitions, r, damping, scan), kalman_smoother(transitions, r, damping, scan)


@pytest.mark.parametrize("scan", SCANS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("shape", [(1, 2), (23, 3)])
def test_filter_and_smoother_equal_the_sequential_ones_and_the_normal_equations(scan, shape):
    A, r, damping = make(*shape)
    mean, covariance, smoothed = both(DenseTransitions(jnp.asarray(A)), jnp.asarray(r), jnp.asarray(damping), scan)
    means, covariances, want = textbook(A, r, damping)
    assert_close(mean, means)
    assert_close(covariance[:, 0], covariances)
    assert_close(smoothed, want)
    assert_close(smoothed, normal_equations(A, r, damping))


def test_diagonal_and_block_diagonal_forms_equal_the_dense_one():
    num_steps, scan = 21, SequentialScan()
    a, r, damping = make(num_steps, 4)
    groups = ((0, 2), (3, 1))
    blocks = np.random.default_rng(1).normal(size=(num_steps, 2, 2, 2))
    for transitions in (
        DiagonalTransitions(jnp.asarray(a[:, 0])),
        BlockDiagonalTransitions(jnp.asarray(blocks), groups),
    ):
        mean, _, smoothed = both(transitions, jnp.asarray(r), jnp.asarray(damping), scan)
        dense = np.asarray(transitions.dense())
        assert_close(mean, textbook(dense, r, damping)[0])
        assert_close(smoothed, normal_equations(dense, r, damping))


def test_without_damping_filter_and_smoother_are_the_linear_recurrence():
    A, r, _ = make(23, 3)
    transitions, r, zero = DenseTransitions(jnp.asarray(A)), jnp.asarray(r), jnp.zeros(23)
    want = SequentialScan().solve(transitions, r)
    for scan in SCANS:
        mean, _, smoothed = both(transitions, r, zero, scan)
        assert_close(mean, want)
        assert_close(smoothed, want, 1e-9)


def random_element(rng, size):
    square = lambda: rng.normal(size=(3, 1, size, size))
    C, J = square(), square()
    # Every other covariance has low rank: singular ones are allowed.
    C[..., 0] *= rng.integers(2)
    return _kalman.KalmanElement(
        *(jnp.asarray(x) for x in (square(), rng.normal(size=(3, 1, size)), C @ C.swapaxes(-1, -2))),
        *(jnp.asarray(x) for x in (rng.normal(size=(3, 1, size)), J @ J.swapaxes(-1, -2))),
    )


def test_composition_is_associative_and_has_a_unit():
    compose = jax.jit(_kalman.compose)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        a, b, c = (random_element(rng, 1 + seed % 3) for _ in range(3))
        left, right = compose(compose(a, b), c), compose(a, compose(b, c))
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
            assert_close(x, y)
        unit = _kalman.identity_like(a)
        for composed in (compose(unit, a), compose(a, unit)):
            for x, y in zip(jax.tree.leaves(composed), jax.tree.leaves(a)):
                assert_close(x, y, 1e-12)


def test_long_sequences_are_filtered_in_segments_with_the_same_result(monkeypatch):
    A, r, damping = make(77, 2)
    args = (DenseTransitions(jnp.asarray(A)), jnp.asarray(r), jnp.asarray(damping))
    filtered = lambda: jax.jit(lambda *args: kalman_filter(*args, SequentialScan()))(*args)
    whole = filtered()
    monkeypatch.setattr(_kalman, "_LARGEST_WHOLE", 1)
    for x, y in zip(filtered(), whole):
        assert_close(x, y, 1e-12)


def test_growth_beyond_the_range_of_the_dtype_is_damped_to_finite_means():
    # Products of the transitions overflow float32 after 100 steps; the mean is bounded by |r| / sqrt(l).
    num_steps = 1000
    r = jnp.ones((num_steps, 1), jnp.float32)
    damping = jnp.full(num_steps, 1e-4, jnp.float32)
    transitions = DiagonalTransitions(jnp.full((num_steps, 1), 2.5, jnp.float32))
    for scan in SCANS:
        mean, _ = jax.jit(kalman_filter, static_argnums=3)(transitions, r, damping, scan)
        assert np.isfinite(mean).all() and float(jnp.max(jnp.abs(mean))) < 1e4
