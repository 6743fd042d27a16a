"""`parallel_scan` returns what `jax.lax.scan` returns, and differentiates as it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import parallel_diffrax as pdx
from parallel_diffrax._recurrence import _implicit_derivative, _matrix_free

from .problems import only_full


NUM_STEPS = 37
XS = jax.random.normal(jax.random.key(1), (NUM_STEPS, 3))
W = jax.random.normal(jax.random.key(0), (3, 3)) / 2
INIT = {"h": jnp.ones(3), "s": (jnp.array(0.3),)}


def cell(w):
    def f(carry, x):
        h = jnp.tanh(w @ carry["h"] + x)
        s = 0.5 * carry["s"][0] + h[0]
        return {"h": h, "s": (s,)}, (h.sum(), {"product": x * s})

    return f


def assert_same(got, want, tolerance=1e-12):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert g.shape == w.shape and g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reverse", [False, True])
def test_carries_and_outputs_are_those_of_lax_scan(reverse):
    assert_same(pdx.parallel_scan(cell(W), INIT, XS, reverse=reverse), lax.scan(cell(W), INIT, XS, reverse=reverse))


def test_values_and_derivatives_agree_under_jit_vmap_and_grad():
    def loss(scan):
        def fn(w, init):
            carry, (y, rest) = scan(cell(w), init, XS)
            return jnp.sum(carry["h"] ** 2) + jnp.sum(jnp.sin(y)) + jnp.sum(rest["product"] ** 2)

        return fn

    ours, theirs = loss(pdx.parallel_scan), loss(lax.scan)
    ws = jnp.stack([W, 1.5 * W])
    got = jax.jit(jax.vmap(jax.value_and_grad(ours, argnums=(0, 1)), in_axes=(0, None)))(ws, INIT)
    want = jax.vmap(jax.value_and_grad(theirs, argnums=(0, 1)), in_axes=(0, None))(ws, INIT)
    assert_same(got, want, 1e-11)


def test_third_derivatives_agree_in_mixed_mode():
    def loss(scan):
        return lambda w: jnp.sum(scan(lambda c, x: (jnp.tanh(w * (W @ c) + x), c.sum()), jnp.ones(3), XS[:9])[1] ** 2)

    ours, theirs = loss(pdx.parallel_scan), loss(lax.scan)
    w = jnp.array([0.5, 1.0, 1.5])
    third = [jax.jacfwd(jax.jacfwd(jax.grad(f)))(w) for f in (ours, theirs)]
    assert_same(*third, 1e-11)


def test_it_finishes_in_sequence_what_newton_does_not_solve():
    def f(carry, x):
        carry = 3.9 * carry * (1 - carry)
        return carry, carry

    _, ys = pdx.parallel_scan(f, jnp.array(0.2), None, length=300, max_steps=3)
    # The map is chaotic: what can be asked for is that every step is right.
    np.testing.assert_allclose(ys[1:], 3.9 * ys[:-1] * (1 - ys[:-1]), rtol=1e-12)
    np.testing.assert_allclose(ys[:25], lax.scan(f, jnp.array(0.2), None, length=25)[1], rtol=1e-8)
    with pytest.raises(RuntimeError):
        pdx.parallel_scan(f, jnp.array(0.2), None, length=300, max_steps=3, policy=pdx.policies.ParallelOnly())


def test_a_scan_that_is_not_finite_raises_unless_told_otherwise():
    def f(carry, x):
        return jnp.where(x > 20, jnp.nan, 0.9 * carry), carry

    xs = jnp.arange(30)
    with pytest.raises(RuntimeError):
        pdx.parallel_scan(f, jnp.ones(2), xs)
    carry, ys = pdx.parallel_scan(f, jnp.ones(2), xs, throw=False)
    assert np.isnan(carry).all()
    want = lax.scan(f, jnp.ones(2), xs)[1]
    np.testing.assert_allclose(ys, want, rtol=1e-12)
    assert np.isnan(want[22:]).all()


def test_integer_inputs_complex_carries_and_a_guess_are_accepted():
    def f(carry, i):
        return carry * (0.9 + 0.3j) + 0.1 * jnp.conj(carry) * jnp.sin(i).astype(complex), carry.real

    xs, init = jnp.arange(25), jnp.array([1.0 + 1.0j])
    want = lax.scan(f, init, xs)
    guess = jnp.ones((25, 1), complex)
    assert_same(pdx.parallel_scan(f, init, xs, guess=guess), want)

    def modulus(scan):
        return lambda a: jnp.sum(jnp.abs(scan(lambda c, i: (a * f(c, i)[0], None), init, xs)[0]) ** 2)

    assert_same(jax.grad(modulus(pdx.parallel_scan))(0.9), jax.grad(modulus(lax.scan))(0.9))


def test_a_large_component_that_nothing_depends_on_does_not_loosen_the_others():
    def f(carry, _):
        y = 3.1 * carry[1] * (1 - carry[1])
        return jnp.stack([carry[0], y]), y

    for size in (1.0, 1e14):
        _, ys = pdx.parallel_scan(f, jnp.array([size, 0.3]), None, length=300)
        np.testing.assert_allclose(ys, lax.scan(f, jnp.array([size, 0.3]), None, length=300)[1], rtol=1e-9)


def test_a_wrong_jacobian_does_not_make_a_guess_a_solution():
    # Rounding to 2^-44 has derivative zero: every update is small, and all of them are wrong.
    f = lambda c, _: (jnp.round((c + 8e-9) * 2.0**44) / 2.0**44, None)
    got, _ = pdx.parallel_scan(f, jnp.array(1.0), None, length=4096)
    np.testing.assert_allclose(got, lax.scan(f, jnp.array(1.0), None, length=4096)[0], rtol=1e-8)


def test_one_step_and_no_step():
    f = lambda c, x: (jnp.sin(c) + x, c)
    for n in (1, 0):
        xs = jnp.arange(float(n))
        assert_same(pdx.parallel_scan(f, jnp.ones(2), xs), lax.scan(f, jnp.ones(2), xs))


def test_wrong_arguments_are_refused_with_a_sentence():
    f = lambda c, x: (c, x)
    with pytest.raises(ValueError, match="one number of steps"):
        pdx.parallel_scan(f, jnp.ones(2))
    with pytest.raises(ValueError, match="one number of steps"):
        pdx.parallel_scan(f, jnp.ones(2), (jnp.ones(3), jnp.ones(4)))
    with pytest.raises(ValueError, match="one number of steps"):
        pdx.parallel_scan(f, jnp.ones(2), jnp.ones(3), length=4)
    with pytest.raises(TypeError, match="into `xs`"):
        pdx.parallel_scan(f, (jnp.ones(2), jnp.array(0)), jnp.ones(3))
    with pytest.raises(TypeError, match="same structure, shapes and dtypes"):
        pdx.parallel_scan(lambda c, x: (c[:1], x), jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="guess"):
        pdx.parallel_scan(f, jnp.ones(2), jnp.ones(3), guess=jnp.ones((4, 2)))


def loss(scan, size, **kwargs):
    xs = jax.random.normal(jax.random.key(3), (80, size))
    weights = 0.5 * jax.random.normal(jax.random.key(4), (size, size)) / np.sqrt(size)

    def fn(scale):
        carry, ys = scan(lambda c, x: (jnp.tanh(weights @ (scale * c)) + x,) * 2, jnp.zeros(size), xs, **kwargs)
        return jnp.sum(carry**2) + jnp.sum(jnp.sin(ys))

    return fn


@pytest.mark.parametrize(
    "root_finder",
    [
        pdx.ParallelNewton(jacobian=pdx.jacobians.Diagonal()),
        pdx.ParallelNewton(jacobian=pdx.jacobians.Hutchinson(2, jax.random.key(0))),
        pdx.ParallelNewton(jacobian=pdx.jacobians.Identity()),
        pdx.ELK(jacobian=pdx.jacobians.Clipped()),
    ],
    ids=["Diagonal", "Hutchinson", "Identity", "ELK"],
)
def test_gradients_are_exact_whatever_approximation_found_the_solution(root_finder):
    scale = jnp.linspace(0.5, 1.0, 3)
    got = jax.jit(jax.grad(loss(pdx.parallel_scan, 3, root_finder=root_finder)))(scale)
    np.testing.assert_allclose(got, jax.jit(jax.grad(loss(lax.scan, 3)))(scale), rtol=1e-8)


@pytest.mark.parametrize("sequential", [True, *only_full(False)])
def test_gradients_of_large_carries_are_made_of_products_iterated_or_in_sequence(sequential, monkeypatch):
    size, scale = 70, jnp.array(0.7)
    assert size > _implicit_derivative._LARGEST_DENSE_SIZE
    if sequential:
        # Jacobi iterations need one for each of the steps that are remembered, here more than are allowed.
        monkeypatch.setattr(_matrix_free, "_MAX_ITERATIONS", 3)
    root_finder = pdx.ParallelNewton(jacobian=pdx.jacobians.Zero(), rtol=1e-7 if sequential else 1e-8)
    ours, theirs = loss(pdx.parallel_scan, size, root_finder=root_finder), loss(lax.scan, size)
    for derivative in (jax.grad, jax.jacfwd):
        got, want = (jax.jit(derivative(f))(scale) for f in (ours, theirs))
        np.testing.assert_allclose(got, want, rtol=1e-6)
    if not sequential:
        second = lambda f: jax.jit(lambda x: jax.jvp(jax.grad(f), (x,), (jnp.ones(()),))[1])(scale)
        np.testing.assert_allclose(second(ours), second(theirs), rtol=1e-6)
