"""A function rewritten in scalars computes the same result, or the rewriting is declined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from parallel_diffrax._kernels._scalarise import as_scalars, scalarise
from parallel_diffrax._recurrence._stepper import step_through_scalars, step_through_vectors


MATRIX = jax.random.normal(jax.random.key(0), (3, 3))
KNOTS = jnp.linspace(-0.5, 1.5, 9)
STATE = jnp.array([0.3, -0.7, 1.1])
INPUTS = (jnp.linspace(0.0, 1.0, 10), jax.random.normal(jax.random.key(1), (10, 2, 3)))


def cast(y):
    return MATRIX.astype(y.dtype)


REWRITTEN = {
    "slices and stacks": lambda y, x: jnp.stack([y[1], -y[0], y[-1] * x[0]]) + y[::-1],
    "matrix products": lambda y, x: jnp.tanh(cast(y) @ y) + (x[1] @ y).sum() + jnp.outer(y, y)[0] + y @ cast(y),
    "reductions": lambda y, x: y * jnp.max(y) + jnp.prod(y) + jnp.sum(x[1], axis=0) - jnp.min(x[1], axis=(0, 1)),
    "where and clip": lambda y, x: jnp.where(y > 0, jnp.clip(y, -1.0, 0.5), x[0] * y),
    "powers and quotients": lambda y, x: y**3 / (1 + jnp.abs(y) ** 1.5) + jnp.sqrt(1 + y**2) + x[0] ** 2,
    "parts compiled apart": lambda y, x: sum(lax.optimization_barrier((jnp.sin(y), x[1].T * y[:, None], x[0]))[::2]),
    "shapes": lambda y, x: jnp.concatenate([y[1:], y[:1]]) + jnp.roll(y, 1) + (x[1].T + y[:, None]).reshape(2, 3)[1],
    "nested functions": lambda y, x: jax.nn.softplus(y) + jax.nn.relu(y) + jax.jit(jnp.sin)(y) + jax.nn.silu(x[0]),
    "padding with zeros": lambda y, x: jnp.concatenate([jnp.zeros(1, y.dtype), y[:-1]]) * x[0],
    "loops of known length": lambda y, x: lax.scan(lambda y, x: (jnp.sin(y + x), y[0]), y, x[1])[1].sum() + y,
    "loops without inputs": lambda y, x: lax.fori_loop(0, 3, lambda i, y: jnp.sin(y) * i.astype(y.dtype), y),
    "loops backwards": lambda y, x: lax.scan(lambda y, x: (jnp.sin(y + x), y * x), y, x[1], reverse=True)[1][0] + y,
    "branches": lambda y, x: lax.cond(y[0] > 0.1, lambda y: (y[::-1], y[0]), lambda y: (2 * y, y[1]), y)[0],
    "more branches": lambda y, x: lax.switch(
        jnp.floor(3 * jnp.abs(y[0])).astype(int), [lambda y: y, jnp.sin, lambda y: y[::-1], jnp.zeros_like], y
    ),
    "entries chosen by numbers": lambda y, x: y[(jnp.floor(9 * y) - 3).astype(int) % 5] + y,
    "entries within bounds": lambda y, x: jnp.take(y, jnp.floor(9 * y).astype(int), mode="clip"),
    "slices chosen by numbers": lambda y, x: (
        lax.dynamic_slice(x[1], (0, jnp.floor(4 * y[0]).astype(int)), (2, 2)).sum() + y
    ),
    "rows chosen by numbers": lambda y, x: x[1][jnp.where(y[:2] > 0.1, 1, 0)].sum(axis=0) * y,
    "entries replaced": lambda y, x: y.at[1].set(x[0]).at[jnp.floor(4 * y[0]).astype(int)].set(y[2]),
    "rows replaced": lambda y, x: jnp.outer(y, y).at[2].set(y).sum(axis=1),
    "places of extrema": lambda y, x: y * (jnp.argmax(y) + 3 * jnp.argmin(x[1].ravel())).astype(y.dtype),
    "padding": lambda y, x: lax.pad(y, jnp.asarray(2.0, y.dtype), [(-1, 2, 1)])[:3] + y,
    "linear systems": lambda y, x: lax.custom_linear_solve(
        lambda z: (2 + y[0] ** 2) * z, y, lambda matvec, b: b / (2 + y[0] ** 2), symmetric=True
    ),
    "tables": lambda y, x: jnp.interp(y, KNOTS.astype(y.dtype), jnp.cos(KNOTS).astype(y.dtype)),
    "broadcasts": lambda y, x: jnp.broadcast_to(x[0], (3,)) + y[None, :].repeat(1, axis=0)[0] + jnp.ones((3,), y.dtype),
}
DECLINED = {
    "sorted entries": lambda y, x: y[jnp.argsort(y)],
    "arrays of size zero": lambda y, x: y + jnp.sum(y[:0]) + jnp.dot(y[:0], y[:0]),
    "products of mixed precision": lambda y, x: (
        y + jnp.dot(y.astype(jnp.float32), y.astype(jnp.float32), preferred_element_type=jnp.float64)
    ),
    "random numbers": lambda y, x: y + jax.random.normal(jax.random.key(0), (3,)),
}


@pytest.mark.parametrize("name", REWRITTEN)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_steps_in_scalars_equal_steps_in_arrays(name, dtype):
    step = lambda y, x: 0.5 * REWRITTEN[name](y, x).astype(dtype)
    state, xs = STATE.astype(dtype), jax.tree.map(lambda x: x.astype(dtype), INPUTS)
    scalar = scalarise(step, state, jax.tree.map(lambda x: x[0], xs), max_cost=4000.0)
    assert scalar is not None
    got, want = step_through_scalars(scalar, state, xs, 10), step_through_vectors(step, state, xs, 10)
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=100 * np.finfo(dtype).eps, atol=100 * np.finfo(dtype).eps)


@pytest.mark.parametrize("name", DECLINED)
def test_a_function_without_a_scalar_form_is_declined(name):
    assert scalarise(DECLINED[name], STATE, jax.tree.map(lambda x: x[0], INPUTS), max_cost=1e9) is None


def test_a_loop_of_unknown_length_has_no_scalar_form_in_xla():
    loop = lambda y, x: lax.while_loop(lambda y: y[0] < 1, lambda y: y + 1, y)
    assert scalarise(loop, STATE, jax.tree.map(lambda x: x[0], INPUTS), max_cost=100.0).xla_cost == np.inf


def test_the_place_of_an_extremum_is_that_of_the_first_nan():
    for values in ([1.0, np.nan, 3.0, np.nan], [2.0, 2.0, 1.0, 1.0], [np.nan, 1.0, 1.0, 0.0]):
        x = jnp.array(values)
        for fn in (jnp.argmax, jnp.argmin):
            scalar = scalarise(fn, x, max_cost=1e3)
            assert scalar(as_scalars(x)).item() == fn(x)


def test_a_function_that_is_too_large_is_declined_and_dead_code_costs_nothing():
    def step(y, x):
        unused = jnp.linalg.inv(jnp.outer(y, y))
        del unused
        return MATRIX @ y

    first = jax.tree.map(lambda x: x[0], INPUTS)
    assert scalarise(step, STATE, first, max_cost=1e9).cost == 2 * 9
    assert scalarise(step, STATE, first, max_cost=17.0) is None
