"""Sequential steps and loops of unknown length have the same results in arrays, in scalars, and in one kernel, which is
emulated here and compiled by Warp for this CPU.
"""

import importlib.util

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel_diffrax._kernels import _batches, _loop, _mosaic, _operations, _probe, _warp, indexed_loop
from parallel_diffrax._recurrence import _stepper
from parallel_diffrax._recurrence._stepper import step_through_vectors, Stepper

from . import emulated_threads
from .problems import only_full


def _whole(x):
    return (x > 0).astype(np.int32)


KNOTS = np.linspace(-1, 1, 61)
# Smooth, so that rounding errors do not grow.
ROWS = np.stack([np.sin(KNOTS), np.cos(2 * KNOTS)], axis=1)
OPERATIONS = {
    "arithmetic": lambda x: (0.3 - x + 1.7 * x) / (2 + x * x) - (-x),
    "comparisons": lambda x: sum(
        jnp.where(c, x, 0.5) for c in (x == 0, x != 0, x < 0.1, x <= 0.1, x > 0.2, x >= 0.2, jnp.isnan(x))
    ),
    "extrema": lambda x: (
        jnp.maximum(x, 0.1) + jnp.minimum(x, 0.1) + jax.lax.clamp(x - 1, 2 * x, x + 1) + jnp.abs(x) + jnp.sign(x)
    ),
    "booleans": lambda x: jnp.where((x > 0) & (x < 1) | ~(x > -0.3) ^ (x < 2), x, -x) * (x > 0).astype(x.dtype),
    "integers": lambda x: (
        x * (_whole(x) + 2 - 3 * _whole(x) + jnp.maximum(_whole(x), 1) - abs(_whole(x))).astype(x.dtype)
    ),
    "choices": lambda x: jax.lax.select_n(_whole(x) * 2, x, 2 * x, 3 * x) + jnp.where(_whole(x) >= 1, x, 0),
    "quotients": lambda x: x * sum((n // d + n % d).astype(x.dtype) for n in (_whole(x) * 7 - 3,) for d in (2, -3, -1)),
    "unsigned": lambda x: x * (_whole(x).astype(np.uint32) // 2 + 7).astype(x.dtype),
    "casts": lambda x: x.astype({4: np.float64, 8: np.float32}[x.dtype.itemsize]).astype(x.dtype),
    "casts to integers": lambda x: (
        (1e11 * x).astype(np.int32).astype(x.dtype) / 2**31 + (7 * x).astype(np.int64).astype(x.dtype)
    ),
    "exponentials": lambda x: jnp.exp(x) + jnp.exp2(x) + jnp.expm1(x) + jnp.log(2 + x * x) + jnp.log1p(x * x),
    "circles": lambda x: jnp.sin(x) + jnp.cos(x) + jnp.tan(x / 4) + jnp.arctan(x) + jnp.arctan2(x, 1 + x * x),
    "inverses": lambda x: (
        jnp.arcsin(x / 9) + jnp.arccos(x / 9) + jnp.arcsinh(x) + jnp.arccosh(x * x + 2) + jnp.arctanh(x / 9)
    ),
    "hyperbolas": lambda x: jnp.sinh(x) + jnp.cosh(x) + jnp.tanh(x) + jax.nn.sigmoid(x),
    "roots": lambda x: jnp.sqrt(jnp.abs(x)) + jnp.cbrt(x) + jax.lax.rsqrt(1 + x * x) + jnp.square(x),
    "powers": lambda x: sum((1 + x * x) ** p for p in (0.5, 1.5, -1.5, -2.5, 3.0, 0.0, -1, -2, 5, 0, 0.3)) + x**3,
    "other powers": lambda x: (1 + x * x) ** x + jax.lax.pow(1 + x * x, _whole(x) + 1),
    "rounding": lambda x: jnp.floor(3 * x) + jnp.ceil(3 * x) + jnp.round(3 * x) + jnp.fmod(9 * x, 0.3) + (9 * x) % 0.3,
    "errors": jax.scipy.special.erf,
    "finite": lambda x: jnp.where(jnp.isfinite(1 / (x - x)), 1.0, x),
    "branches": lambda x: jax.lax.cond(x[0] > 0, lambda x: x[::-1], lambda x: 2 * x, x),
    "loops of unknown length": lambda x: jax.lax.while_loop(
        lambda carry: (carry[0][0] < 2) & carry[2],
        lambda carry: (carry[0] + carry[1], carry[1] / 2, x[1] > -3),
        (x, x + 1, x[0] > 0),
    )[0],
    "entries replaced": lambda x: x.at[0].set(x[1]).at[_whole(x)[0]].set(2 * x[0]),
    "places of extrema": lambda x: x * (jnp.argmax(x) - 2 * jnp.argmin(jnp.stack([x[1], x[0], x[1]]))).astype(x.dtype),
    "linear systems": lambda x: jax.lax.custom_linear_solve(
        lambda y: (2 + x[0] ** 2) * y, jnp.pad(x, (1, 2))[1:3], lambda matvec, b: b / (2 + x[0] ** 2), symmetric=True
    ),
    "tables": lambda x: jnp.interp(x, KNOTS[::10].astype(x.dtype), KNOTS[::10].astype(x.dtype) ** 2),
    "long tables": lambda x: jnp.interp(x, jnp.asarray(KNOTS, x.dtype), jnp.asarray(ROWS[:, 0], x.dtype)),
    "paths": lambda x: dfx.LinearInterpolation(jnp.asarray(KNOTS, x.dtype), jnp.asarray(ROWS, x.dtype)).evaluate(
        jnp.clip(x[0], -0.99, 0.99)
    ),
    "rows of tables": lambda x: jnp.asarray(ROWS.T, x.dtype).T[(9 * x[0]).astype(int) % 60] + x,
    "roll of one entry": lambda x: jnp.roll(jnp.reshape(x, (1, -1)), 1, axis=0).reshape(jnp.shape(x)),
}


@pytest.fixture(params=["emulated", "warp"])
def kernels(monkeypatch, request):
    """Runs loops in kernels, as if there were a GPU. Returns the list of the kernels that were built."""
    built, build = [], _loop.build
    launch = emulated_threads.launch if request.param == "emulated" else launch_by_warp()

    def recorded(*args):
        built.append(build(*args))
        return built[-1]

    monkeypatch.setattr(_loop, "build", recorded)
    monkeypatch.setattr(_loop, "backend", lambda test, *kernels: launch)
    monkeypatch.setattr(_loop, "on_cpu", lambda *kernels: False)
    monkeypatch.setattr(_stepper, "on_cpu", lambda *kernels: False)
    return built


def launch_by_warp():
    """Warp's kernels on this CPU."""
    if importlib.util.find_spec("warp") is None:
        pytest.fail(
            "These tests compile kernels by Warp: `pip install 'parallel_diffrax[test]'`, or `pip install warp-lang`."
        )
    return _warp.launch


def bounded(x):
    """A bounded function of which rounding errors do not grow."""
    return x / (1 + abs(x))


def loop_of(fn):
    def body(carry, x):
        y, k = carry
        value = fn(0.9 * y + x)
        return (bounded(value), k + 1), value, k, jnp.where(k + 1 < 4, k + 1, -1)

    return body


@pytest.mark.parametrize("dtype", [np.float64, *only_full(np.float32)])
def test_every_operation_lowers_for_a_gpu_and_is_that_of_jax_in_an_emulated_thread(dtype):
    carry, table = (np.array([0.3, -0.4], dtype), np.zeros((), np.int32)), np.zeros((4, 2), dtype)
    used, zero = set(), np.zeros((), np.int32)
    for name, fn in OPERATIONS.items():
        built = _loop.build(loop_of(fn), carry, table, 4, 2e3, _mosaic.launch)
        assert built is not None, name
        used |= {operation.partition("[")[0] for operation in built.scalar.operations}
        assert "mosaic" in built.lower("cuda").as_text(), name
        built.launch = emulated_threads.launch
        (y, _), outputs = jax.jit(built.run)(carry, zero, table, built.operands)
        (want_y, _), want = _loop.loop_in_arrays(loop_of(fn), *jax.tree.map(jnp.asarray, (carry, zero, table)), 4)
        eps = 100 * np.finfo(dtype).eps
        np.testing.assert_allclose(y, want_y, rtol=eps, atol=eps, err_msg=name)
        np.testing.assert_allclose(outputs, want, rtol=eps, atol=eps, err_msg=name)
    # Differentiation alone makes the first, and the others do nothing.
    assert _operations._RULES.keys() - used <= {"add_any", "stop_gradient", "copy"}


@pytest.mark.parametrize("dtype", [np.float64, *only_full(np.float32)])
def test_every_operation_is_that_of_jax_in_a_thread_by_warp_and_compiles_for_older_gpus(monkeypatch, tmp_path, dtype):
    carry, table = (np.array([0.3, -0.4], dtype), np.zeros((), np.int32)), np.zeros((4, 2), dtype)
    zero = np.zeros((), np.int32)

    def body(carry, x):
        y, k = carry
        values = {name: fn(0.9 * y + x) for name, fn in OPERATIONS.items()}
        y = 0.7 * y[::-1] + 0.1
        return (y, k + 1), values, k, jnp.where(k + 1 < 4, k + 1, -1)

    built = _loop.build(body, carry, table, 4, 1e4, launch_by_warp())
    assert built is not None
    kernels, build = [], _warp.build
    monkeypatch.setattr(_warp, "build", lambda *args: kernels.append(build(*args)) or kernels[-1])
    _, outputs = jax.jit(built.run)(carry, zero, table, built.operands)
    _, want = _loop.loop_in_arrays(body, *jax.tree.map(jnp.asarray, (carry, zero, table)), 4)
    eps = 100 * np.finfo(dtype).eps
    for name in OPERATIONS:
        np.testing.assert_allclose(outputs[name], want[name], rtol=eps, atol=eps, err_msg=name)
    import warp

    warp.compile_aot_module(kernels[0].module, arch=[80, 89], module_dir=tmp_path, use_ptx=True)
    texts = [file.read_bytes() for file in tmp_path.glob("*.ptx")]
    assert len(texts) == 2 and all(
        any(target in text for text in texts) for target in (b".target sm_80", b".target sm_89")
    )


@pytest.mark.parametrize("dtype", [np.float64, *only_full(np.float32)])
def test_a_loop_in_a_kernel_is_the_loop_in_arrays(kernels, dtype):
    def body(carry, x):
        y, k = carry
        y = sum(0.1 * bounded(fn(0.5 * y + x[0] + 0.1 * x[1].sum().astype(dtype))) for fn in OPERATIONS.values())
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
    (y, k), outputs, _ = jax.jit(lambda carry, tables: indexed_loop(body, carry, zero, tables, 20))(carry, tables)
    (want_y, want_k), want = _loop.loop_in_arrays(body, carry, zero, tables, 20)
    assert [found is not None for found in kernels] == [True]
    assert k == want_k and 3 < k <= 13
    eps = 50 * np.finfo(dtype).eps
    np.testing.assert_allclose(y, want_y, rtol=eps, atol=eps)
    written = [i for i in range(int(k)) if i not in (2, 5)]
    for got, expected in zip(jax.tree.leaves(outputs), jax.tree.leaves(want)):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        np.testing.assert_allclose(got[np.array(written)], expected[np.array(written)], rtol=eps, atol=eps)


def test_steps_in_a_kernel_equal_steps_in_arrays_with_traced_weights_in_a_batch(kernels):
    xs = jnp.linspace(0.0, 1.0, 7), jax.random.normal(jax.random.key(1), (7, 2))
    weights = jax.random.normal(jax.random.key(0), (3, 2, 2))

    def states(weights, state, count, kernel):
        twice = lambda y, x: jax.lax.fori_loop(0, 2, lambda i, y: jnp.tanh(weights @ y + x[1] * jnp.sin(x[0] + i)), y)
        step = lambda y, x: jnp.cos(twice(y, x))
        if not kernel:
            return step_through_vectors(step, state, xs, 7), 7
        stepper = Stepper(step, state, jax.tree.map(lambda x: x[0], xs), 7)
        assert stepper.chunk == 7
        return stepper(state, xs, count, check=True)[:2]

    starts, counts = jnp.arange(6.0).reshape(3, 2), jnp.array([7, 3, 1])
    got, made = jax.jit(jax.vmap(lambda *args: states(*args, True)))(weights, starts, counts)
    want, _ = jax.jit(jax.vmap(lambda *args: states(*args, False)))(weights, starts, counts)
    assert len(kernels) == 1 and kernels[0] is not None
    assert made.tolist() == [7, 3, 1]
    for k, count in enumerate(made):
        np.testing.assert_allclose(got[k, :count], want[k, :count], rtol=1e-14)
        # The rest repeats the last step.
        np.testing.assert_array_equal(got[k, count:], np.broadcast_to(got[k, count - 1], (7 - int(count), 2)))


def test_tables_of_each_member_are_looked_up_in_memory(kernels):
    tables = jax.random.normal(jax.random.key(0), (3, 2, 50))
    xs, knots = jnp.linspace(0.0, 1.0, 30), jnp.linspace(-1.0, 2.0, 50)

    def states(table, kernel):
        def step(y, x):
            return 0.5 * y + jnp.interp(x + 0.01 * y, knots, table[1]) + table[0, 7]

        if not kernel:
            return step_through_vectors(step, jnp.ones(2), xs, 30)
        stepper = Stepper(step, jnp.ones(2), xs[0], 30)
        assert stepper.kernel is not None and len(stepper.kernel.operands) == 2
        return stepper(jnp.ones(2), xs, 30, check=True).states

    got, want = (jax.jit(jax.vmap(lambda table, flag=flag: states(table, flag)))(tables) for flag in (True, False))
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_with_while_finite_a_loop_ends_at_the_first_non_finite_state(kernels):
    def steps(start, while_finite):
        stepper = Stepper(lambda y, x: x * y**2, start, xs[0], 20, while_finite)
        return stepper(start, xs, 20)[:2]

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


def test_on_several_devices_a_large_batch_stops_after_the_chunk_in_which_it_ends(kernels, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr(_batches, "_LARGEST_REPEATED_BATCH", 1)
    monkeypatch.setattr(_stepper, "_CHUNK", 16)
    xs = jnp.linspace(0.0, 1.0, 64)
    starts, counts = jnp.array([[1.0], [2.0]]), jnp.array([20, 3])
    stepper = Stepper(lambda y, x: jnp.sin(y + x), starts[0], xs[0], 64)
    got, made = jax.jit(jax.vmap(lambda start, count: stepper(start, xs, count)[:2]))(starts, counts)
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
    # On several devices, first three members fit into one kernel and six do not. Then three do not either.
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    for largest in (3, 2):
        monkeypatch.setattr(_batches, "_LARGEST_REPEATED_BATCH", largest)
        other, count = both()
        np.testing.assert_allclose(other, y, rtol=1e-14)
        np.testing.assert_array_equal(count, k)


def test_without_room_for_outputs_a_kernel_stores_none(kernels):
    body = lambda carry, _: ((1.5 * carry[0], carry[1] + 1), carry[0], carry[1], jnp.where(carry[1] < 8, 0, -1))
    zero = np.zeros((), np.int32)
    loop = _loop.kernel_loop(body, (np.zeros(()), zero), (), 0, 1e3)
    assert loop is not None and kernels == [loop]
    (y, count), outputs = jax.jit(jax.vmap(lambda start: loop.run((start, zero), zero, (), [])))(jnp.arange(3.0))
    np.testing.assert_array_equal(y, 1.5**9 * np.arange(3))
    assert count.tolist() == [9] * 3 and outputs.shape == (3, 0)


def test_a_loop_that_kernels_do_not_support_is_declined_and_runs_otherwise(monkeypatch):
    monkeypatch.setattr(_loop, "backend", lambda test, *kernels: emulated_threads.launch)
    carry, table = (np.ones(2), np.zeros((), np.int32)), np.zeros((4, 2))
    zero = jnp.zeros((), jnp.int32)
    for fn in (lambda x: x[jnp.argsort(x)], jax.lax.lgamma):
        assert _loop.kernel_loop(loop_of(fn), carry, table, 4, 1e3) is None
        end, outputs, _ = indexed_loop(loop_of(fn), jax.tree.map(jnp.asarray, carry), zero, jnp.asarray(table), 4)
        assert outputs.shape == (4, 2) and int(end[1]) == 4
    half = (np.ones(2, np.float16), np.zeros((), np.int32))
    assert _loop.kernel_loop(loop_of(jnp.sin), half, np.zeros((4, 2), np.float16), 4, 1e3) is None
    assert _loop.kernel_loop(loop_of(jnp.sin), carry, table, 4, 3.0) is None


def test_without_a_gpu_there_are_no_kernel_loops():
    assert jax.default_backend() != "cpu" or _probe.backend(_loop.passes_common_test) is None
