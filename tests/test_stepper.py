"""Sequential steps and loops of unknown length have the same results in arrays, in scalars, and in one GPU kernel, which is
interpreted here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel_diffrax._kernels import _loop, indexed_loop
from parallel_diffrax._kernels._compat import interpreted
from parallel_diffrax._recurrence import _stepper
from parallel_diffrax._recurrence._stepper import step_through_vectors, Stepper


def _whole(x):
    return (x > 0).astype(np.int32)


OPERATIONS = {
    "abs": jnp.abs,
    "add": lambda x: x + 0.3,
    "and[b]": lambda x: jnp.where((x > 0) & (x < 1), x, -x),
    "convert_element_type": lambda x: x.astype({4: np.float64, 8: np.float32}[x.dtype.itemsize]).astype(x.dtype),
    "cos": jnp.cos,
    "div": lambda x: x / (2 + x * x),
    "eq": lambda x: jnp.where(x == 0, 1.0, x),
    "exp": jnp.exp,
    "ge": lambda x: jnp.where(x >= 0, x, 0.5),
    "gt": lambda x: jnp.where(x > 0, x, 0.5),
    "le": lambda x: jnp.where(x <= 0, x, 0.5),
    "log": lambda x: jnp.log(2 + x * x),
    "lt": lambda x: jnp.where(x < 0, x, 0.5),
    "max": lambda x: jnp.maximum(x, 0.1),
    "min": lambda x: jnp.minimum(x, 0.1),
    "mul": lambda x: x * 1.7,
    "ne": lambda x: jnp.where(x != 0, x, 1.0),
    "neg": lambda x: -x,
    "or[b]": lambda x: jnp.where((x > 1) | (x < 0), x, -x),
    "select_n[b]": lambda x: jnp.where(x > 0, x, 2 * x),
    "sin": jnp.sin,
    "square": jnp.square,
    "sub": lambda x: 0.3 - x,
    "tanh": jnp.tanh,
    "add[i]": lambda x: x * (_whole(x) + 2).astype(x.dtype),
    "eq[i]": lambda x: jnp.where(_whole(x) == 1, x, -x),
    "ge[i]": lambda x: jnp.where(_whole(x) >= 1, x, -x),
    "gt[i]": lambda x: jnp.where(_whole(x) > 0, x, -x),
    "le[i]": lambda x: jnp.where(_whole(x) <= 0, x, -x),
    "lt[i]": lambda x: jnp.where(_whole(x) < 1, x, -x),
    "max[i]": lambda x: x * jnp.maximum(_whole(x), 1).astype(x.dtype),
    "min[i]": lambda x: x * jnp.minimum(_whole(x), 0).astype(x.dtype),
    "mul[i]": lambda x: x * (_whole(x) * 3).astype(x.dtype),
    "ne[i]": lambda x: jnp.where(_whole(x) != 1, x, -x),
    "sub[i]": lambda x: x * (2 - _whole(x)).astype(x.dtype),
    "select_n[bi]": lambda x: x * jnp.where(x > 0, _whole(x), 3).astype(x.dtype),
    "convert_element_type[b]": lambda x: x * (x > 0).astype(x.dtype),
    "convert_element_type[bi]": lambda x: x * _whole(x).astype(x.dtype),
    "convert_element_type[i]": lambda x: x * _whole(x).astype(x.dtype),
    # Expressed by other operations.
    "integer_pow": lambda x: x**3,
    "is_finite": lambda x: jnp.where(jnp.isfinite(1 / (x - x)), 1.0, x),
    "logistic": jax.nn.sigmoid,
}
# Expressed by roots and products.
POWERS = (0.5, 1.5, -1.5, -2.5, 3.0, 0.0, -1, -2, 5, 0)


@pytest.fixture
def kernels(monkeypatch):
    """Runs loops in interpreted kernels, as if there were a GPU. Returns the list of the kernels that were built."""
    built, build = [], _loop._build
    # Interpreted kernels need not, and cannot, be lowered for a GPU.
    monkeypatch.setattr(_loop.KernelLoop, "lower", lambda self: None)

    def build_interpreted(*args):
        found = build(*args, interpret=interpreted())
        built.append(found)
        return found

    monkeypatch.setattr(_loop, "_build", build_interpreted)
    monkeypatch.setattr(_loop, "loop_kernels_work", lambda: True)
    monkeypatch.setattr(_loop, "on_cpu", lambda: False)
    monkeypatch.setattr(_stepper, "on_cpu", lambda: False)
    monkeypatch.setattr(_stepper.lax, "platform_dependent", lambda *args, cuda, **_: cuda(*args), raising=True)
    return built


def loop_of(fn):
    def body(carry, x):
        y, k = carry
        y = fn(0.9 * y + x)
        return (y, k + 1), y, k, jnp.where(k + 1 < 4, k + 1, -1)

    return body


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_known_operation_lowers_for_a_gpu(dtype):
    assert set(OPERATIONS) == _loop.KNOWN | {"integer_pow", "is_finite", "logistic"}
    carry, table = (np.array([0.3, -0.4], dtype), np.zeros((), np.int32)), np.zeros((4, 2), dtype)
    for name, fn in OPERATIONS.items():
        built = _loop._build(loop_of(fn), carry, table, 4, 1e3)
        assert built is not None and name in built.scalar.operations, name
        assert "mosaic" in built.lower().as_text(), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_loop_in_a_kernel_is_the_loop_in_arrays(kernels, dtype):
    def body(carry, x):
        y, k = carry
        y = sum(0.1 * fn(0.5 * y + x[0] + 0.1 * x[1].sum().astype(dtype)) for fn in OPERATIONS.values())
        y = y + 0.01 * sum((1 + y * y) ** power for power in POWERS)
        # Some outputs are overwritten, and the length is not known in advance.
        return (
            (y, k + 1),
            {"y": y, "sum": jnp.sum(y)},
            jnp.where((k == 2) | (k == 5), k - 1, k),
            jnp.where((k < 12) & (y[0] < 30), k + 1, -1),
        )

    tables = jnp.linspace(-1, 1, 20).astype(dtype), jnp.arange(40).reshape(20, 2)
    carry = jnp.array([0.2, -0.3], dtype), jnp.zeros((), jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    (y, k), outputs = jax.jit(lambda carry, tables: indexed_loop(body, carry, zero, tables, 20))(carry, tables)
    (want_y, want_k), want = _loop.loop_in_arrays(body, carry, zero, tables, 20)
    assert [found is not None for found in kernels] == [True]
    assert k == want_k and 3 < k <= 13
    eps = 50 * np.finfo(dtype).eps
    np.testing.assert_allclose(y, want_y, rtol=eps, atol=eps)
    written = [i for i in range(int(k)) if i not in (2, 5)]
    for got, expected in zip(jax.tree.leaves(outputs), jax.tree.leaves(want)):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        np.testing.assert_allclose(got[np.array(written)], expected[np.array(written)], rtol=eps, atol=eps)


@pytest.mark.parametrize("largest", [512, 2])
def test_steps_in_a_kernel_equal_steps_in_arrays_with_traced_weights_in_a_batch(kernels, monkeypatch, largest):
    # A batch of three: small enough for the kernel, and too large for it.
    monkeypatch.setattr(_loop, "_LARGEST_BATCH", largest)
    xs = jnp.linspace(0.0, 1.0, 7), jax.random.normal(jax.random.key(1), (7, 2))
    weights = jax.random.normal(jax.random.key(0), (3, 2, 2))

    def states(weights, state, count, kernel):
        twice = lambda y, x: jax.lax.fori_loop(0, 2, lambda i, y: jnp.tanh(weights @ y + x[1] * jnp.sin(x[0] + i)), y)
        step = lambda y, x: jnp.cos(twice(y, x))
        if not kernel:
            return step_through_vectors(step, state, xs, 7), 7
        stepper = Stepper(step, state, jax.tree.map(lambda x: x[0], xs), 7)
        assert stepper.chunk == 7
        return stepper(state, xs, count)

    starts, counts = jnp.arange(6.0).reshape(3, 2), jnp.array([7, 3, 1])
    got, made = jax.jit(jax.vmap(lambda *args: states(*args, True)))(weights, starts, counts)
    want, _ = jax.jit(jax.vmap(lambda *args: states(*args, False)))(weights, starts, counts)
    assert len(kernels) == 1 and kernels[0] is not None
    assert made.tolist() == ([7, 3, 1] if largest > 3 else [7, 7, 7])
    for k, count in enumerate(made):
        np.testing.assert_allclose(got[k, :count], want[k, :count], rtol=1e-14)
        # The rest repeats the last step.
        np.testing.assert_array_equal(got[k, count:], np.broadcast_to(got[k, count - 1], (7 - int(count), 2)))


def test_with_while_finite_a_loop_ends_at_the_first_non_finite_state(kernels):
    def steps(start, while_finite):
        stepper = Stepper(lambda y, x: x * y**2, start, xs[0], 20, while_finite)
        return stepper(start, xs, 20)

    xs = jnp.ones(20)
    starts = jnp.array([[1.1, 1.0], [0.5, 1.0], [jnp.nan, 1.0]])
    states, made = jax.jit(jax.vmap(lambda start: steps(start, True)))(starts)
    whole, all_made = jax.jit(jax.vmap(lambda start: steps(start, False)))(starts)
    assert all_made.tolist() == [20, 20, 20]
    # 1.1^(2^13) overflows.
    assert made.tolist() == [13, 20, 1]
    for k, count in enumerate(made):
        np.testing.assert_array_equal(states[k, :count], whole[k, :count])
        assert not np.isfinite(states[k, count:]).all(axis=1).any()


def test_a_large_batch_stops_after_the_chunk_in_which_it_ends(kernels, monkeypatch):
    monkeypatch.setattr(_loop, "_LARGEST_BATCH", 1)
    monkeypatch.setattr(_stepper, "_CHUNK", 16)
    xs = jnp.linspace(0.0, 1.0, 64)
    starts, counts = jnp.array([[1.0], [2.0]]), jnp.array([20, 3])
    stepper = Stepper(lambda y, x: jnp.sin(y + x), starts[0], xs[0], 64)
    got, made = jax.jit(jax.vmap(lambda start, count: stepper(start, xs, count)))(starts, counts)
    want = jax.vmap(lambda start: step_through_vectors(stepper.step, start, xs, 64))(starts)
    assert made.tolist() == [32, 16]
    for k, count in enumerate(made):
        np.testing.assert_allclose(got[k, :count], want[k, :count], rtol=1e-14)
        np.testing.assert_array_equal(got[k, count:], np.broadcast_to(got[k, count - 1], (64 - int(count), 1)))


def test_a_loop_in_batches_of_any_size_agrees(kernels, monkeypatch):
    tables = jnp.linspace(-1.0, 1.0, 9)

    def run(factor, start):
        def body(carry, x):
            y, k = carry
            y = factor * y + x
            return (y, k + 1), y, k, jnp.where((k < 8) & (y < 3), k + 1, -1)

        return indexed_loop(body, (start, jnp.zeros((), jnp.int32)), jnp.zeros((), jnp.int32), tables, 9)[0]

    factors, starts = jnp.array([1.1, 1.4]), jnp.array([0.5, 1.0, 2.0])
    both = lambda: jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))(factors, starts)
    y, k = both()
    assert k.min() < 9 == k.max()
    # First, three members fit into one kernel and six do not. Then three do not either.
    for largest in (3, 2):
        monkeypatch.setattr(_loop, "_LARGEST_BATCH", largest)
        other, count = both()
        np.testing.assert_allclose(other, y, rtol=1e-14)
        np.testing.assert_array_equal(count, k)


def test_a_loop_that_kernels_do_not_support_is_declined_and_runs_otherwise(monkeypatch):
    monkeypatch.setattr(_loop, "loop_kernels_work", lambda: True)
    carry, table = (np.ones(2), np.zeros((), np.int32)), np.zeros((4, 2))
    zero = jnp.zeros((), jnp.int32)
    for fn in (
        lambda x: jax.lax.while_loop(lambda x: x[0] > 1, lambda x: 0.5 * x, x),
        lambda x: x[jnp.argsort(x)],
        jnp.arccosh,
    ):
        assert _loop.kernel_loop(loop_of(fn), carry, table, 4, 1e3) is None
        end, outputs = indexed_loop(loop_of(fn), jax.tree.map(jnp.asarray, carry), zero, jnp.asarray(table), 4)
        assert outputs.shape == (4, 2) and int(end[1]) == 4
    half = (np.ones(2, np.float16), np.zeros((), np.int32))
    assert _loop.kernel_loop(loop_of(jnp.sin), half, np.zeros((4, 2), np.float16), 4, 1e3) is None
    assert _loop.kernel_loop(loop_of(jnp.sin), carry, table, 4, 3.0) is None


def test_without_a_gpu_there_are_no_kernel_loops():
    assert jax.default_backend() != "cpu" or not _loop.loop_kernels_work()
