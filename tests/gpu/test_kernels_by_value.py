"""Every kernel, by either backend, returns on a GPU what arrays and sequential steps return: all operations and sizes."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx
from benchmarks.smooth_problems import ring
from parallel_diffrax._kernels import _linear_recurrence, _loop, _mosaic, _operations, _probe, _warp, indexed_loop
from parallel_diffrax._recurrence._shooting import ITERATIONS
from parallel_diffrax._recurrence._stepper import step_through_vectors, Stepper

from ..problems import parallel_solver
from ..test_kernel_scan import loop, make, SHAPES
from ..test_stepper import loop_of, OPERATIONS


DTYPES = [np.float32, np.float64]
ZERO = np.zeros((), np.int32)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
LAUNCH = {"mosaic": _mosaic.launch, "warp": _warp.launch}


@pytest.fixture(params=LAUNCH, autouse=True)
def launch(request, monkeypatch):
    """Every test runs by either backend. (A backend that cannot run fails the first test.)"""
    monkeypatch.setenv(_probe.VARIABLE, request.param)
    # What was traced with another backend must not be found again.
    jax.clear_caches()
    return LAUNCH[request.param]


def close(got, want, precision, factor=200.0):
    want = np.asarray(want)
    assert got.shape == want.shape and got.dtype == want.dtype
    size = max(1.0, np.abs(want[np.isfinite(want)]).max(initial=0))
    np.testing.assert_allclose(got, want, rtol=0, atol=factor * np.finfo(precision).eps * size)


@pytest.mark.parametrize(
    "test", [_loop.passes_common_test, _loop.passes_rare_test, _linear_recurrence.passes_scan_test]
)
def test_the_tests_at_first_use_pass(launch, test):
    assert test(launch) and _probe.backend(test) is launch


@dtypes
@pytest.mark.parametrize("name", sorted(_operations.FUNCTIONS))
def test_each_function_by_itself(launch, dtype, name):
    assert _loop._test_loop(launch, np.dtype(dtype), [name])


@dtypes
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_each_operation_is_that_of_xla(launch, dtype, name):
    carry, table = (np.array([0.3, -0.4], dtype), ZERO), np.linspace(-1, 1, 8).reshape(4, 2).astype(dtype)
    kernel = _loop.build(loop_of(OPERATIONS[name]), carry, table, 4, 2e3, launch)
    assert kernel is not None
    (y, _), outputs = jax.jit(kernel.run)(carry, ZERO, table, kernel.operands)
    args = jax.tree.map(jnp.asarray, (carry, ZERO, table))
    (want_y, _), want = jax.jit(lambda *args: _loop.loop_in_arrays(loop_of(OPERATIONS[name]), *args, 4))(*args)
    # XLA does not round a number to float32 and back.
    precision = np.float32 if name == "casts" else dtype
    close(y, want_y, precision)
    close(outputs, want, precision)


def test_the_smallest_and_largest_integers_and_divisions_by_zero_are_those_of_xla(launch):
    numbers = np.array([0, 1, -1, 7, -7, 2**31 - 1, -(2**31)], np.int32)
    pairs = np.array([(a, b) for a in numbers for b in numbers], np.int32)
    floats = np.array([0.0, -0.0, 1.5, -2.5, np.inf, -np.inf, np.nan, 3e9, -3e9, 1e19])

    def body(carry, x):
        pair, number = x
        a, b = pair
        whole = [jax.lax.div(a, b), jax.lax.rem(a, b), jnp.maximum(a, b), jnp.sign(a), abs(a), a * b - b]
        casts = [number.astype(np.int32), number.astype(np.float32).astype(np.int32)]
        other = [number, jnp.maximum(number, 1.0), jnp.minimum(number, 1.0), jnp.round(number), jnp.sign(number)]
        other += [jnp.fmod(number, 0.7), number.astype(np.int64).astype(float)]
        out = jnp.stack(whole + casts), jnp.stack(other)
        return carry + 1, out, carry, jnp.where(carry + 1 < len(pairs), carry + 1, -1)

    tables = pairs, np.resize(floats, len(pairs))
    kernel = _loop.build(body, ZERO, tables, len(pairs), 2e3, launch)
    assert kernel is not None
    _, (whole, other) = jax.jit(kernel.run)(ZERO, ZERO, tables, [])
    args = jax.tree.map(jnp.asarray, (ZERO, ZERO, tables))
    _, (want_whole, want_other) = jax.jit(lambda *args: _loop.loop_in_arrays(body, *args, len(pairs)))(*args)
    np.testing.assert_array_equal(whole, want_whole)
    # The remainder of more than the digits of a quotient is NaN.
    want_other = np.array(want_other)
    want_other[np.abs(want_other[:, 0]) > 1e15, 5] = np.nan
    np.testing.assert_allclose(other, want_other, rtol=1e-13, atol=1e-13)


@dtypes
@pytest.mark.parametrize("members", [1, 2, 31, 32, 33, 127, 129, 4097, 16384, 16385, 40000])
def test_each_member_of_a_batch_has_its_own_numbers_and_ends_when_it_is_done(dtype, members):
    tables = np.linspace(-1.0, 1.0, 9).astype(dtype)
    starts = np.linspace(-2.0, 2.0, 2 * members).reshape(members, 2).astype(dtype)
    limits = np.linspace(0.5, 4.0, members).astype(dtype)

    def run(start, limit, in_kernel=True):
        def body(carry, x):
            y, k = carry
            y = 1.3 * y + x
            return (y, k + 1), y, k, jnp.where((k < 8) & (abs(y).max() < limit), k + 1, -1)

        loop = indexed_loop if in_kernel else _loop.loop_in_arrays
        return loop(body, (start, jnp.asarray(ZERO)), jnp.asarray(ZERO), jnp.asarray(tables), 9)

    (y, count), outputs, in_kernel = jax.jit(jax.vmap(run))(starts, limits)
    assert np.all(in_kernel)
    (want, want_count), want_outputs = jax.jit(jax.vmap(functools.partial(run, in_kernel=False)))(starts, limits)
    np.testing.assert_array_equal(count, want_count)
    close(y, want, dtype)
    written = np.arange(9) < np.asarray(count)[:, None]
    close(np.where(written[..., None], outputs, 0), np.where(written[..., None], want_outputs, 0), dtype)


@dtypes
def test_nested_batches_of_weights_states_and_inputs(dtype):
    rng = np.random.default_rng(0)
    weights, starts, inputs = (rng.normal(size=s).astype(dtype) for s in ((3, 2, 2), (5, 2), (4, 50, 2)))

    def states(weights, start, xs, in_kernel=True):
        step = lambda y, x: jnp.tanh(weights @ y + x)
        if not in_kernel:
            return step_through_vectors(step, start, xs, 50)
        stepper = Stepper(step, start, xs[0], 50)
        assert stepper.kernel is not None and stepper.chunk == 50
        return stepper(start, xs, 50, check=True).states

    def batched(fn):
        for axes in ((None, None, 0), (None, 0, None), (0, None, None)):
            fn = jax.vmap(fn, axes)
        return jax.jit(fn)

    got = batched(states)(weights, starts, inputs)
    close(got, batched(functools.partial(states, in_kernel=False))(weights, starts, inputs), dtype)


def test_many_weights_are_read_in_every_step():
    rng = np.random.default_rng(0)
    first, second = jnp.asarray(rng.normal(size=(16, 4)) / 2), jnp.asarray(rng.normal(size=(4, 16)) / 2)
    xs = jnp.asarray(rng.normal(size=(40, 4)))

    def states(first, in_kernel):
        step = lambda y, x: y + 0.1 * (second @ jnp.tanh(first @ y) + x)
        if not in_kernel:
            return step_through_vectors(step, jnp.ones(4), xs, 40)
        stepper = Stepper(step, jnp.ones(4), xs[0], 40)
        assert stepper.kernel is not None
        return stepper(jnp.ones(4), xs, 40, check=True).states

    weights = jnp.stack([first, 0.5 * first, -first])
    got, want = (jax.jit(jax.vmap(functools.partial(states, in_kernel=flag)))(weights) for flag in (True, False))
    close(got, want, np.float64)


@dtypes
@pytest.mark.parametrize("shape, size", [*SHAPES, ((16400,), 2), ((16400,), 4), ((70000,), 2)])
def test_scans(launch, dtype, shape, size):
    A, r = make(shape, size, dtype)
    blocks = (A[:, None], r[:, None]) if len(shape) == 1 else (A, r)
    for reverse in (False, True):
        solve = functools.partial(_linear_recurrence._solve, launch, reverse=reverse)
        got = jax.jit(solve)(*(jnp.asarray(x)[None] for x in blocks))[0]
        want = loop(*blocks, reverse)
        close(got, want.astype(dtype), dtype)


def test_a_batch_of_scans_with_shared_and_with_own_matrices():
    A, r = make((3, 300, 1), 2)
    solve = lambda A, r: _linear_recurrence.linear_recurrence_in_kernels(A, r, False, lambda A, r: r)
    want = np.stack([loop(A[k], r[k], False) for k in range(3)])
    close(jax.jit(jax.vmap(solve))(A, r), want, np.float64)
    want = np.stack([loop(A[0], r[k], False) for k in range(3)])
    close(jax.jit(jax.vmap(solve, (None, 0)))(A[0], r), want, np.float64)


def lotka_volterra(t, y, args):
    u, v = y
    return jnp.stack([u - args * u * v, args * u * v - v])


@dtypes
@pytest.mark.parametrize("base", [dfx.Tsit5(), dfx.Heun(), dfx.Dopri8()], ids=lambda x: type(x).__name__)
def test_a_batch_of_whole_solves_in_sequence_is_diffrax(dtype, base):
    starts = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (300, 2)), dtype)
    rates = jnp.linspace(0.5, 1.5, 300).astype(dtype)

    def solve(solver, dt0, y0, rate):
        term, times = dfx.ODETerm(lotka_volterra), (jnp.asarray(0.0, dtype), jnp.asarray(4.0, dtype))
        solution = dfx.diffeqsolve(term, solver, *times, jnp.asarray(dt0, dtype), y0, rate)
        return solution.ys[0], solution.result == dfx.RESULTS.successful

    parallel = parallel_solver(base, 64, policy=pdx.policies.Sequential())
    ys, successful = jax.jit(jax.vmap(functools.partial(solve, parallel, 4.0)))(starts, rates)
    assert successful.all()
    want, _ = jax.jit(jax.vmap(functools.partial(solve, base, 4.0 / 64)))(starts, rates)
    close(ys, want, dtype, 2000)


def test_a_batch_that_is_driven_by_paths_of_its_own():
    times, paths = jnp.linspace(0.0, 2.0, 501), jnp.asarray(np.random.default_rng(0).normal(size=(200, 501)))

    def solve(solver, dt0, path):
        drive = dfx.LinearInterpolation(times, path)
        term = dfx.ODETerm(lambda t, y, args: drive.evaluate(t) - y)
        solution = dfx.diffeqsolve(term, solver, 0.0, 2.0, dt0, jnp.ones(2), max_steps=None)
        return solution.ys[0], solution.result == dfx.RESULTS.successful

    parallel = parallel_solver(dfx.Tsit5(), 100, policy=pdx.policies.Sequential())
    ys, successful = jax.jit(jax.vmap(functools.partial(solve, parallel, 2.0)))(paths)
    assert successful.all()
    want, _ = jax.jit(jax.vmap(functools.partial(solve, dfx.Tsit5(), 0.02)))(paths)
    close(ys, want, np.float64, 2000)


@pytest.mark.parametrize("members", [1, 33, 5000])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-8])
def test_adaptive_solves_and_their_gradients_are_those_of_diffrax(members, tolerance):
    controller = dfx.PIDController(rtol=tolerance, atol=1e-2 * tolerance)

    def end(solve, rate, y0):
        term = dfx.ODETerm(lotka_volterra)
        sol = solve(term, dfx.Tsit5(), 0.0, 4.0, None, y0, rate, stepsize_controller=controller, max_steps=512)
        return sol.ys[0, 0], (sol.stats["num_accepted_steps"], sol.stats["num_rejected_steps"])

    def both(solve):
        fn = jax.value_and_grad(functools.partial(end, solve), (0, 1), has_aux=True)
        return jax.jit(jax.vmap(fn))(rates, starts)

    rates = jnp.linspace(0.5, 1.5, members)
    starts = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (members, 2)))
    (got, counts), gradients = both(pdx.diffeqsolve)
    (want, want_counts), want_gradients = both(dfx.diffeqsolve)
    assert all(np.mean(a == b) > 0.99 for a, b in zip(counts, want_counts))
    same = np.asarray(counts[0] == want_counts[0])
    close(np.asarray(got)[same], np.asarray(want)[same], np.float64, 1e5)
    for a, b in zip(gradients, want_gradients):
        close(np.asarray(a)[same], np.asarray(b)[same], np.float64, 1e6)
    sol = jax.jit(lambda rate: pdx.diffeqsolve(
        dfx.ODETerm(lotka_volterra), dfx.Tsit5(), 0.0, 4.0, None, starts[0], rate, stepsize_controller=controller
    ))(1.0)  # fmt: skip
    assert int(pdx.statistics(sol).kernel_steps) == int(pdx.statistics(sol).sequential_steps) > 0


@dtypes
@pytest.mark.parametrize("num_steps, size, members", [(4099, 2, 1), (4099, 8, 3), (140_003, 2, 1), (20_000, 4, 2)])
def test_steps_by_multiple_shooting_and_their_gradients_are_those_in_sequence(dtype, num_steps, size, members):
    problem = ring(size)
    term = dfx.ODETerm(lambda t, y, rate: rate * problem.field(t, y, None))
    starts = np.broadcast_to(problem.y0, (members, size)) * np.linspace(0.95, 1, members)[:, None]

    def end(policy, scan, y0, rate):
        dtype = y0.dtype
        root_finder = pdx.ParallelNewton(rtol=1e-5 if dtype == np.float32 else 1e-8, scan=scan)
        solver = pdx.ParallelSolver(dfx.Tsit5(), num_steps, root_finder=root_finder, policy=policy)
        options = dict(saveat=dfx.SaveAt(t1=True, solver_state=True), max_steps=1, adjoint=dfx.DirectAdjoint())
        t1 = jnp.asarray(40.0, dtype)
        sol = dfx.diffeqsolve(term, solver, jnp.zeros((), dtype), t1, t1, y0, rate, **options)
        counts = pdx.statistics(sol)
        return jnp.sum(sol.ys**2), (sol.ys, counts.parallel_steps, counts.iterations)

    def both(policy, scan, dtype):
        fn = jax.value_and_grad(lambda *args: end(policy, scan, *args), (0, 1), has_aux=True)
        return jax.jit(jax.vmap(fn, (0, None)))(jnp.asarray(starts, dtype), jnp.ones((), dtype))

    (_, (got, steps, iterations)), gradients = both(pdx.AdaptivePolicy(), pdx.scans.AutoScan(), dtype)
    assert np.all(steps == num_steps) and np.all(iterations % ITERATIONS == 0)
    # In double precision: in sequence, the rounding errors of all steps add up.
    (_, (want, *_)), exact = both(pdx.policies.Sequential(), pdx.scans.AssociativeScan(), np.float64)
    factor = 1e4 if dtype == np.float64 else 1e2
    close(got, np.asarray(want, dtype), dtype, factor)
    for a, b in zip(gradients, exact):
        close(a, np.asarray(b, dtype), dtype, 100 * factor)
