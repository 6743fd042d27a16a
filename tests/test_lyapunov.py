"""Lyapunov exponents: against closed forms, published values and a power iteration in NumPy; finite at any length."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx
from benchmarks.flows import linear, lorenz63, van_der_pol
from parallel_diffrax._scan import compose, DenseTransitions, frame_growth, products, ScaledProduct, total_product
from parallel_diffrax._scan._growth import binary_exponent, power_of_two

from .problems import only_full, parallel_solver, relative_difference


IN_SEQUENCE = pdx.policies.Sequential()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_powers_of_two_are_exact(dtype):
    x = np.array([1.0, 1.5, 0.75, 3e-30, 7e30, 0.0, 2.0**-126], dtype)
    want = np.frexp(x)[1] - 1
    want[x == 0] = 0
    np.testing.assert_array_equal(binary_exponent(jnp.asarray(x)), want)
    exponents = np.arange(-100, 100)
    np.testing.assert_array_equal(power_of_two(jnp.asarray(exponents), dtype), np.ldexp(np.ones(200, dtype), exponents))


def test_scaled_products_are_associative_and_have_an_identity():
    rng = np.random.default_rng(0)
    a, b, c = (ScaledProduct.make(jnp.asarray(10.0**k * rng.normal(size=(5, 3, 3)))) for k in (-20, 0, 30))
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    np.testing.assert_allclose(left.log_growth(), right.log_growth(), rtol=1e-14)
    identity = ScaledProduct.identity(3, jnp.zeros(()).dtype)
    for product in (compose(identity, a), compose(a, identity)):
        np.testing.assert_array_equal(product.P, a.P)
        np.testing.assert_array_equal(product.exponent, a.exponent)


@pytest.mark.parametrize("factor", [1e6, *only_full(1.0, 1e-6)])
def test_a_million_factors_neither_overflow_nor_underflow_in_single_precision(factor):
    num_steps = 10**6 + 3
    angle = jnp.linspace(0.0, 3.0, num_steps, dtype=jnp.float32)
    rotations = jnp.stack([jnp.cos(angle), -jnp.sin(angle), jnp.sin(angle), jnp.cos(angle)], axis=1).reshape(-1, 2, 2)
    A = DenseTransitions(factor * rotations)
    growth = jax.jit(lambda A: products(A, pdx.scans.AssociativeScan()).log_growth())(A)
    total = jax.jit(lambda A: total_product(A).log_growth())(A)
    index = np.arange(1, num_steps + 1)
    # Rounding of the rotations themselves adds up to a few epsilons a step.
    np.testing.assert_allclose(growth, index * np.log(factor), rtol=1e-6, atol=num_steps * 2e-8)
    np.testing.assert_allclose(total, growth[-1], rtol=1e-6, atol=num_steps * 2e-8)


def test_products_of_random_matrices_agree_in_every_evaluation():
    @jax.jit
    def growths(A):
        A = DenseTransitions(A)
        every = [products(A, scan).log_growth() for scan in (pdx.scans.AssociativeScan(), pdx.scans.SequentialScan())]
        return *every, total_product(A).log_growth()

    parallel, sequential, total = growths(jax.random.normal(jax.random.key(1), (777, 4, 4)))
    np.testing.assert_allclose(parallel, sequential, rtol=1e-12)
    np.testing.assert_allclose(total, sequential[-1], rtol=1e-12)


@pytest.mark.parametrize("smallest", [0.5, 1e-3])
def test_frames_are_stretched_alike_by_blocks_and_step_by_step(smallest):
    # The product of sixteen of the second kind forgets its smallest direction: these are factorised one by one.
    rng = np.random.default_rng(2)
    A = np.diag([2.0, 1.0, smallest]) + 0.1 * np.triu(rng.normal(size=(100, 3, 3)), 1)
    frame, logs = frame_growth(jnp.asarray(A), jnp.eye(3))
    np.testing.assert_allclose(frame.T @ frame, np.eye(3), atol=1e-14)
    np.testing.assert_allclose(jnp.sum(logs, axis=0), 100 * np.log([2.0, 1.0, smallest]), atol=1e-10)


def henon(y, x):
    y = jnp.stack([1 - 1.4 * y[0] ** 2 + y[1] + x, 0.3 * y[0]])
    return y, y


def by_power_iteration(trajectory, skipped):
    v, total = np.eye(2) / np.sqrt(2), 0.0
    for k, y in enumerate(trajectory):
        v = np.array([[-2.8 * y[0], 1.0], [0.3, 0.0]]) @ v
        norm = np.linalg.norm(v)
        v, total = v / norm, total + (np.log(norm) if k >= skipped else 0.0)
    return total / (len(trajectory) - skipped)


def test_a_map_has_the_exponents_of_a_power_iteration():
    num_steps, init = 5000, jnp.array([0.1, 0.1])
    xs = jnp.zeros(num_steps)
    got = pdx.diagnostics.scan_lyapunov_exponent(henon, init, xs, num_exponents=2, policy=IN_SEQUENCE)
    ys = pdx.parallel_scan(henon, init, xs, policy=IN_SEQUENCE)[1]
    want = by_power_iteration(np.concatenate([init[None], ys[:-1]]), num_steps // 10)
    assert abs(got.exponent - want) < 1e-6
    assert abs(got.exponent / 0.4192 - 1) < 0.03
    # The determinant of every Jacobian is -0.3.
    assert abs(jnp.sum(got.spectrum) - np.log(0.3)) < 1e-10
    assert abs(got.spectrum[0] - got.exponent) < 1e-3
    assert got.growth.shape == (num_steps,)
    np.testing.assert_array_equal(got.ts, np.arange(1, num_steps + 1))


def estimate(field, y0, t1, num_steps, **options):
    term = dfx.ODETerm(lambda t, y, args: field(y))
    return pdx.lyapunov_exponent(
        term, dfx.Bosh3(), 0.0, t1, y0, num_steps=num_steps, policy=IN_SEQUENCE, **options
    )  # fmt: skip


def test_linear_systems_have_the_exponents_of_their_eigenvalues_and_parallel_is_sequential():
    got = estimate(linear, jnp.ones(3), 100.0, 4000, num_exponents=3, scan=pdx.scans.AssociativeScan())
    np.testing.assert_allclose(got.spectrum, [-0.5, -1.0, -3.0], atol=1e-3)
    sequential = estimate(linear, jnp.ones(3), 100.0, 4000, scan=pdx.scans.SequentialScan())
    assert abs(got.exponent - sequential.exponent) < 1e-12
    assert abs(got.exponent + 0.5) < 1e-3
    # From the beginning, the curve is that of the matrix exponential.
    matrix = np.array([[-0.5, 1.0, 0.0], [0.0, -1.0, 2.0], [0.0, 0.0, -3.0]])
    values, vectors = np.linalg.eig(matrix)
    at_one = vectors @ np.diag(np.exp(values)) @ np.linalg.inv(vectors)
    np.testing.assert_allclose(got.growth[39], np.log(np.linalg.norm(at_one) / np.sqrt(3)), atol=1e-6)
    assert relative_difference(got.ts[39], 1.0) < 1e-14


def test_a_limit_cycle_has_exponents_zero_and_minus_one():
    got = estimate(van_der_pol, jnp.array([2.0, 0.0]), 400.0, 16_000, num_exponents=2)
    assert abs(got.exponent) < 0.01
    np.testing.assert_allclose(got.spectrum, [0.0, -1.06], atol=0.01)


def test_lorenz_is_within_three_percent_over_a_thousand_time_units_of_many_parts():
    got = estimate(lorenz63, jnp.ones(3), 1000.0, 100_000, num_exponents=3)
    assert abs(got.exponent / 0.9056 - 1) < 0.03
    assert abs(got.spectrum[0] - got.exponent) < 0.005
    assert abs(got.spectrum[1]) < 0.01
    # The divergence of the field is constant.
    assert abs(jnp.sum(got.spectrum) + 1 + 10 + 8 / 3) < 0.02


def test_a_million_steps_in_single_precision():
    # Under strict promotion Diffrax refuses float32 states with float64 times, which a million steps need.
    with jax.numpy_dtype_promotion("standard"):
        got = estimate(lorenz63, jnp.ones(3, jnp.float32), 1e4, 10**6)
    assert got.growth.dtype == jnp.float32
    assert np.isfinite(got.growth).all()
    assert abs(got.exponent / 0.9056 - 1) < 0.03


def test_a_trajectory_that_blows_up_raises_or_gives_nan():
    term = dfx.ODETerm(lambda t, y, args: y**2)
    options = {"num_steps": 100, "policy": IN_SEQUENCE}
    with pytest.raises(RuntimeError):
        jax.block_until_ready(pdx.lyapunov_exponent(term, dfx.Bosh3(), 0.0, 10.0, jnp.ones(1), **options))
    got = pdx.lyapunov_exponent(term, dfx.Bosh3(), 0.0, 10.0, jnp.ones(1), throw=False, **options)
    assert np.isnan(got.exponent)


def test_bad_arguments_are_refused_by_name():
    term = dfx.ODETerm(lambda t, y, args: -y)
    options = {"num_steps": 10}
    for wrong in ({"num_steps": 0}, {"transient": 1.0}, {"transient": -0.1}, {"num_exponents": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            pdx.lyapunov_exponent(term, dfx.Bosh3(), 0.0, 1.0, jnp.ones(2), **(options | wrong))
    noise = dfx.ControlTerm(lambda t, y, args: y, dfx.VirtualBrownianTree(0.0, 1.0, 0.1, (), jax.random.key(0)))
    with pytest.raises(ValueError, match="noise"):
        pdx.lyapunov_exponent(dfx.MultiTerm(term, noise), dfx.Euler(), 0.0, 1.0, jnp.ones(2), num_steps=10)
    with pytest.raises(ValueError, match="max_steps"):
        pdx.lyapunov_exponent(term, dfx.Bosh3(), 0.0, 1.0, jnp.ones(2), max_steps=0, **options)
    with pytest.raises(ValueError, match="Give the base solver"):
        pdx.lyapunov_exponent(term, parallel_solver(dfx.Bosh3(), 8), 0.0, 1.0, jnp.ones(2), **options)
    with pytest.raises(RuntimeError, match="over no time"):
        pdx.lyapunov_exponent(term, dfx.Bosh3(), 1.0, 1.0, jnp.ones(2), policy=IN_SEQUENCE, **options)
    with pytest.raises(ValueError, match="num_exponents"):
        pdx.diagnostics.scan_lyapunov_exponent(henon, jnp.ones(2), jnp.zeros(10), num_exponents=-1)
