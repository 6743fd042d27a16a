"""Multiple shooting in kernels solves for the states after intervals of steps, and has the solution of all steps.

The kernels run by Warp, on this CPU.
"""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx
from parallel_diffrax._recurrence import _driver, _implicit_derivative, _interval_products, Recurrence
from parallel_diffrax._recurrence._cost import interval_length
from parallel_diffrax._recurrence._interval_products import _checked as checked, products_in_intervals
from parallel_diffrax._recurrence._shooting import ITERATIONS, Shooting
from parallel_diffrax._scan import DenseTransitions, solve_bidiagonal

from .problems import fitzhugh_nagumo, lorenz, only_full
from .test_stepper import launch_by_warp


POLICY = pdx.AdaptivePolicy(kernels="warp")
LENGTH = 8


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch):
    """Intervals of eight steps, however few there are. Returns the numbers of steps of all recurrences in intervals."""
    launch_by_warp()
    monkeypatch.setattr(_driver, "interval_length", lambda *_: LENGTH)
    jax.clear_caches()
    sizes, of = [], Shooting.of.__func__
    record = lambda cls, recurrence, *args: sizes.append(recurrence.length) or of(cls, recurrence, *args)
    monkeypatch.setattr(Shooting, "of", classmethod(record))
    return sizes


def solve(field, num_steps, t1, y0, policy=POLICY, adjoint=dfx.DirectAdjoint(), **options):
    """The solve of one window, with its statistics."""
    solver = pdx.ParallelSolver(dfx.Tsit5(), num_steps, policy=policy, **options)
    saveat = dfx.SaveAt(t1=True, ts=[0.3 * t1], solver_state=True)
    return dfx.diffeqsolve(
        dfx.ODETerm(field), solver, 0.0, t1, t1, y0, saveat=saveat, max_steps=1, throw=False, adjoint=adjoint
    )


def in_sequence(field, num_steps, t1, y0):
    saveat = dfx.SaveAt(t1=True, ts=[0.3 * t1])
    return dfx.diffeqsolve(dfx.ODETerm(field), dfx.Tsit5(), 0.0, t1, t1 / num_steps, y0, saveat=saveat)


@pytest.mark.parametrize("incremental, count", [(True, 21), *only_full((True, 30), (False, 21), (False, 30))])
def test_intervals_with_their_jacobians_and_states_are_those_of_the_steps_one_by_one(incremental, count):
    def step(y, x):
        moved = jnp.stack([y[1] * x[0], jnp.sin(y[0]) - x[1] * y[1]])
        return 0.1 * moved if incremental else y + 0.1 * moved

    inputs = tuple(jnp.asarray(np.random.default_rng(k).normal(size=30)) for k in range(2))
    recurrence = Recurrence.make(step, jnp.array([0.5, -1.0]), inputs, 30, incremental)
    shooting = Shooting.of(recurrence, jnp.asarray(count), LENGTH, "warp")
    y = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2)))
    (r, transitions), states = shooting.linearise(y), shooting.all_states(y)

    def interval(start, m):
        found, state = [], start
        for i in range(m * LENGTH, min((m + 1) * LENGTH, 30)):
            state = recurrence.step(state, (inputs[0][i], inputs[1][i])) if i < count else state
            found.append(state)
        return state, found

    for m in range(4):
        start = recurrence.init if m == 0 else y[m - 1]
        end, found = interval(start, m)
        np.testing.assert_allclose(r[m], end - y[m], atol=1e-14)
        jacobian = jax.jacfwd(lambda y, m=m: interval(y, m)[0])(start)
        np.testing.assert_allclose(transitions.A[m], jacobian, atol=1e-14)
        # The state after an interval is the unknown itself, and steps that are not made repeat it.
        made = min(max(count - m * LENGTH, 0), LENGTH)
        want = [*found[: max(made - 1, 0)], *[y[m]] * (len(found) - max(made - 1, 0))]
        np.testing.assert_allclose(states[m * LENGTH : (m + 1) * LENGTH], want, atol=1e-14)


@pytest.mark.full
def test_a_batch_is_solved_with_its_derivative_as_in_sequence(short_intervals):
    field = lambda t, y, args: fitzhugh_nagumo(t, y)
    y0 = jnp.array([[-1.0, 1.0], [-0.9, 1.1], [-1.1, 0.9]])
    run = lambda y0: solve(field, 803, 20.0, y0)
    sol = jax.jit(jax.vmap(run))(y0)
    counts = pdx.statistics(sol)
    assert np.all(sol.result == dfx.RESULTS.successful) and np.all(counts.parallel_steps == 803)
    assert np.all(counts.iterations == ITERATIONS) and np.all(counts.attempts == 1) and short_intervals == [803]
    want = jax.vmap(lambda y0: in_sequence(field, 803, 20.0, y0).ys)(y0)
    np.testing.assert_allclose(sol.ys, want, atol=2e-14)
    gradient = jax.jit(jax.grad(lambda y0: jnp.sum(run(y0).ys ** 2)))(y0[0])
    exact = jax.grad(lambda y0: jnp.sum(in_sequence(field, 803, 20.0, y0).ys ** 2))(y0[0])
    np.testing.assert_allclose(gradient, exact, rtol=1e-10)


@pytest.mark.full
def test_chaos_is_solved_in_segments_from_finer_guesses():
    field, y0 = lambda t, y, args: lorenz(t, y), jnp.array([1.0, 0.0, 20.0])
    sol = jax.jit(lambda y0: solve(field, 2000, 20.0, y0))(y0)
    counts = pdx.statistics(sol)
    assert sol.result == dfx.RESULTS.successful
    assert counts.sequential_steps < 500 and counts.attempts > 1
    want = in_sequence(field, 2000, 20.0, y0)
    np.testing.assert_allclose(sol.ys[0], want.ys[0], atol=1e-10)
    # A change of `y0` by 1e-15 changes this by 3e-6.
    np.testing.assert_allclose(sol.ys[1], want.ys[1], atol=1e-5)


@pytest.mark.full
def test_steps_of_any_length_and_number_in_single_precision():
    # The window has room for more steps than the grid has.
    field, y0 = lambda t, y, args: fitzhugh_nagumo(t, y) * (1 + 0.1 * jnp.sin(t)), jnp.array([-1.0, 1.0], jnp.float32)
    ts = jnp.asarray(np.linspace(0, 1, 602) ** 1.1 * 20, jnp.float32)
    solver = pdx.ParallelSolver(dfx.Tsit5(), 700, policy=POLICY, ts=ts)
    saveat = dfx.SaveAt(t1=True, solver_state=True)
    call = functools.partial(dfx.diffeqsolve, dfx.ODETerm(field), t0=ts[0], t1=ts[-1], dt0=None, y0=y0, saveat=saveat)
    sol = call(solver, stepsize_controller=pdx.Windows(), max_steps=1)
    assert pdx.statistics(sol).parallel_steps == 601 and sol.ys.dtype == jnp.float32
    want = dfx.diffeqsolve(dfx.ODETerm(field), dfx.Tsit5(), ts[0], ts[-1], None, y0, stepsize_controller=dfx.StepTo(ts))
    np.testing.assert_allclose(sol.ys, want.ys, atol=2e-5)


def test_a_solution_that_ends_fails_as_in_sequence():
    sol = solve(lambda t, y, args: y**2, 600, 2.0, jnp.array([0.1, 1.0]))
    assert sol.result == dfx.RESULTS.nonfinite
    # Up to there it is right.
    np.testing.assert_allclose(sol.ys[0], [0.1 / (1 - 0.06), 1 / (1 - 0.6)], rtol=1e-8)


def test_a_kernel_that_returns_wrong_states_is_found_out(monkeypatch):
    field, y0 = lambda t, y, args: fitzhugh_nagumo(t, y), jnp.array([-1.0, 1.0])
    all_states = Shooting.all_states
    monkeypatch.setattr(Shooting, "all_states", lambda self, y: all_states(self, y).at[100].add(1e-5))
    sol = solve(field, 600, 15.0, y0, pdx.AdaptivePolicy(kernels="warp", min_steps=50))
    counts = pdx.statistics(sol)
    assert sol.result == dfx.RESULTS.successful and counts.attempts > 1
    np.testing.assert_allclose(sol.ys, in_sequence(field, 600, 15.0, y0).ys, atol=2e-14)


@pytest.mark.parametrize(
    "options",
    [
        {"root_find_max_steps": ITERATIONS - 1},
        {"root_finder": pdx.ELK()},
        {"root_finder": pdx.ParallelNewton(scan=pdx.scans.AssociativeScan())},
        {"predictor": pdx.predictors.MultilevelPredictor()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_a_user_chooses_is_not_replaced(short_intervals, options):
    structs = jax.eval_shape(lambda y0: solve(lambda t, y, args: -y, 100, 1.0, y0, **options).ys, jnp.ones(2))
    assert structs.shape == (2, 2) and short_intervals == []


def test_a_constant_guess_is_enough_for_decay(short_intervals):
    sol = solve(lambda t, y, args: -y, 200, 3.0, jnp.ones(2), predictor=pdx.ConstantPredictor())
    assert pdx.statistics(sol).parallel_steps == 200 and short_intervals[0] == 200
    np.testing.assert_allclose(sol.ys[1], np.exp(-3.0), rtol=1e-9)


def test_intervals_are_powers_of_two_and_only_where_they_pay():
    lengths = {n: interval_length(n, 2) for n in (1000, 2048, 16384, 100_000, 2**20, 10**8)}
    assert lengths == {1000: 1, 2048: 4, 16384: 8, 100_000: 32, 2**20: 64, 10**8: 64}
    assert interval_length(2**20, 8) == 64 and interval_length(2**20, 9) == 1


@pytest.mark.parametrize("count", [45, *only_full(16)])
def test_derivatives_by_products_in_intervals_are_those_of_the_jacobians(count):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    weights, previous, x, r, c = draw(3, 3), draw(count, 3), draw(count), draw(count, 3), draw(count, 3)
    # A step that is not finite depends on nothing, whatever its Jacobian.
    finite = jnp.arange(count) != 11
    previous = previous.at[11].set(jnp.nan)
    step = lambda w, y, x: jnp.tanh(w @ y) * x + 0.9 * y

    def in_intervals(w, previous, r):
        fixed = lambda y, x: step(w, y, x)
        return products_in_intervals(fixed, previous, x, finite, r, pdx.scans.AutoScan(), LENGTH, "warp")

    def by_jacobians(w, previous, r):
        A = jax.vmap(jax.jacfwd(lambda y, x: step(w, y, x)), (0, 0))(previous, x)
        return solve_bidiagonal(DenseTransitions(jnp.where(finite[:, None, None], A, 0)), r)

    args = weights, previous, r
    loss = lambda solve: lambda *args: jnp.sum(c * solve(*args))
    second = lambda solve: jax.grad(lambda w: jnp.sum(jax.grad(loss(solve))(w, previous.at[11].set(0), r) ** 2))

    def everything(solve):
        batch = jax.vmap(lambda scale: jax.grad(loss(solve), 2)(weights, previous, scale * r))
        return {
            "value": solve(*args),
            "forward": jax.jvp(lambda r: solve(weights, previous, r), (r,), (c,))[1],
            "reverse": jax.grad(loss(solve), 2)(*args),
            "by the parts of the steps": jax.grad(loss(solve), (0, 1))(weights, previous.at[11].set(0), r),
            "second": second(solve)(weights),
            "batch": batch(jnp.array([1.0, 2.0])),
        }

    found, want = (jax.jit(lambda solve=solve: everything(solve))() for solve in (in_intervals, by_jacobians))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), found, want)


def test_products_of_a_kernel_that_is_wrong_are_nan(monkeypatch):
    y, r = jnp.ones((40, 2)), jnp.ones((40, 2))
    wrong = lambda solver: lambda matvec, b: checked(lambda b: 1.001 * solver(b))(matvec, b)
    monkeypatch.setattr(_interval_products, "_checked", wrong)
    step, finite = lambda y, x: 0.9 * y * x, jnp.ones(40, bool)
    d = products_in_intervals(step, y, jnp.ones(40), finite, r, pdx.scans.AutoScan(), LENGTH, "warp")
    assert np.all(np.isnan(d))


@pytest.mark.full
def test_long_windows_are_differentiated_by_products(monkeypatch):
    monkeypatch.setattr(_implicit_derivative, "derivative_interval_length", lambda *_: LENGTH)
    used = []
    record = lambda *args: used.append(args[6]) or products_in_intervals(*args)
    monkeypatch.setattr(_implicit_derivative, "products_in_intervals", record)
    field = lambda t, y, args: fitzhugh_nagumo(t, y)
    y0 = jnp.array([-1.0, 1.0])
    gradient = jax.jit(jax.grad(lambda y0: jnp.sum(solve(field, 403, 10.0, y0).ys ** 2)))(y0)
    exact = jax.grad(lambda y0: jnp.sum(in_sequence(field, 403, 10.0, y0).ys ** 2))(y0)
    np.testing.assert_allclose(gradient, exact, rtol=1e-10)
    assert set(used) == {LENGTH}


@pytest.mark.full
def test_values_and_derivatives_are_the_same_under_shard_map(monkeypatch):
    monkeypatch.setattr(_implicit_derivative, "derivative_interval_length", lambda *_: LENGTH)
    field = lambda t, y, args: fitzhugh_nagumo(t, y)
    run = jax.vmap(jax.value_and_grad(lambda y0: jnp.sum(solve(field, 203, 5.0, y0).ys ** 2)))
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch")
    y0 = jnp.array([[-1.0, 1.0], [-0.9, 1.1]])
    spread = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False))(y0)
    jax.tree.map(np.testing.assert_array_equal, spread, jax.jit(run)(y0))
