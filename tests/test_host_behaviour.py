"""What Diffrax does at the edges of its interface is done with `ParallelSolver` too: the same result, or the same error."""

import functools
import warnings

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, only_full, parallel_solver, relative_difference


NUM_STEPS, WINDOWS = 48, 4
PARALLEL = parallel_solver(
    dfx.Bosh3(), NUM_STEPS // WINDOWS, predictor=pdx.ConstantPredictor(), policy=pdx.policies.ParallelThenSequential()
)
# The solver, how many steps make the span, and how many of them make a window.
SIDES = ((PARALLEL, WINDOWS, 1), (dfx.Bosh3(), NUM_STEPS, NUM_STEPS // WINDOWS))


def both(t0=0.0, t1=4.0, y0=DRIVEN_Y0, term=DRIVEN, windows=None, **options):
    """The solutions in parallel and in sequence; `windows` is the largest number of steps that may be made."""
    out = []
    for solver, count, steps in SIDES:
        limit = {} if windows is None else {"max_steps": windows * steps}
        step = (t1 - t0) / count
        out.append(dfx.diffeqsolve(term, solver, t0, t1, step, y0, DRIVEN_ARGS, **limit, **options))
    return out


@jax.jit
def two_windows(t0, t1, ts):
    """All that can be saved of at most two windows."""
    return both(t0, t1, windows=2, throw=False, saveat=dfx.SaveAt(t0=True, t1=True, ts=ts, made_jump=True))


def test_a_span_of_no_length_returns_the_initial_state():
    two = jnp.array(2.0)
    got, want = two_windows(two, two, jnp.full(3, two))
    np.testing.assert_array_equal(got.ys, want.ys)
    np.testing.assert_array_equal(got.ys, jnp.broadcast_to(DRIVEN_Y0, got.ys.shape))
    np.testing.assert_array_equal(got.ts, want.ts)
    assert got.result == want.result == dfx.RESULTS.successful
    assert int(got.stats["num_steps"]) == int(want.stats["num_steps"]) == 0


def test_a_step_size_of_none_is_chosen_by_an_adaptive_controller_and_refused_by_a_constant_one():
    controller = dfx.PIDController(rtol=1e-6, atol=1e-6)
    exact = dfx.diffeqsolve(DRIVEN, dfx.Dopri8(), 0.0, 4.0, 0.01, DRIVEN_Y0, DRIVEN_ARGS).ys
    for solver, _, _ in SIDES:
        sol = dfx.diffeqsolve(
            DRIVEN, solver, 0.0, 4.0, None, DRIVEN_Y0, DRIVEN_ARGS, stepsize_controller=controller, max_steps=200
        )
        assert relative_difference(sol.ys, exact) < 1e-4
        with pytest.raises(ValueError, match="dt0"):
            dfx.diffeqsolve(DRIVEN, solver, 0.0, 4.0, None, DRIVEN_Y0, DRIVEN_ARGS)


def test_running_out_of_steps_is_reported_and_what_was_saved_by_then_is_right():
    got, want = two_windows(jnp.array(0.0), jnp.array(4.0), jnp.array([0.5, 1.5, 3.9]))
    assert got.result == want.result == dfx.RESULTS.max_steps_reached
    np.testing.assert_array_equal(np.isfinite(got.ys), np.isfinite(want.ys))
    finite = np.isfinite(want.ys)
    np.testing.assert_allclose(got.ys[finite], want.ys[finite], rtol=1e-12)
    assert bool(got.made_jump) == bool(want.made_jump) is False
    with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of solver steps"):
        dfx.diffeqsolve(DRIVEN, PARALLEL, 0.0, 4.0, 4.0 / WINDOWS, DRIVEN_Y0, DRIVEN_ARGS, max_steps=2)


def test_times_may_be_integers_and_the_state_a_number_of_python():
    term = dfx.ODETerm(lambda t, y, args: jnp.cos(t) - y)
    got, want = both(0, 4, 1, term)
    assert got.ts.dtype == want.ts.dtype and got.ys.dtype == want.ys.dtype
    assert relative_difference(got.ys, want.ys) < 1e-13


FORCED = dfx.ODETerm(lambda t, y, args: (jnp.cos(t) - jnp.sin(y)).astype(y.dtype))


@functools.cache
def forced_in_double_precision():
    return dfx.diffeqsolve(FORCED, dfx.Bosh3(), 0.0, 4.0, 4.0 / NUM_STEPS, DRIVEN_Y0).ys


# In single precision: `test_accuracy.py`.
@pytest.mark.parametrize("dtype", [*only_full(jnp.float16), jnp.bfloat16], ids=lambda d: d.__name__)
def test_states_of_low_precision_stay_as_they_are(dtype):
    times = jnp.asarray([0.0, 4.0], dtype)
    got, want = both(times[0], times[1], DRIVEN_Y0.astype(dtype), FORCED)
    assert got.ys.dtype == want.ys.dtype == dtype
    # In sequence, each step's rounding adds up.
    exact = forced_in_double_precision()
    eps = float(jnp.finfo(dtype).eps)
    assert got.result == want.result
    assert relative_difference(got.ys.astype(float), exact) < 8 * eps + 2 * relative_difference(
        want.ys.astype(float), exact
    )


def test_states_may_be_pytrees_with_scalars_and_empty_leaves():
    def field(t, y, args):
        return {"a": -y["a"] * y["b"], "b": jnp.sin(t) - y["b"], "none": None, "empty": y["empty"]}

    y0 = {"a": jnp.ones((2, 2)), "b": 0.3, "none": None, "empty": jnp.zeros((0, 3))}
    got, want = both(y0=y0, term=dfx.ODETerm(field))
    assert jax.tree.structure(got.ys) == jax.tree.structure(want.ys)
    for a, b in zip(jax.tree.leaves(got.ys), jax.tree.leaves(want.ys)):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_jumps_are_stepped_to_and_reported():
    term = dfx.ODETerm(lambda t, y, args: jnp.where(t < 1.3, 1.0, -2.0) - 0.5 * y)
    controller = dfx.ClipStepSizeController(
        dfx.PIDController(rtol=1e-7, atol=1e-7, dtmax=0.5), jump_ts=jnp.array([1.3]), step_ts=jnp.array([0.7])
    )
    saveat = dfx.SaveAt(ts=jnp.array([0.7, 1.3, 2.0]), t1=True, made_jump=True)
    got, want = both(term=term, stepsize_controller=controller, saveat=saveat, windows=None)
    assert relative_difference(got.ys, want.ys) < 1e-6
    assert bool(got.made_jump) == bool(want.made_jump)


def test_a_steady_state_event_ends_the_solve():
    term = dfx.ODETerm(lambda t, y, args: 1.0 - y)
    event = dfx.Event(dfx.steady_state_event(rtol=1e-4, atol=1e-4, norm=optx.rms_norm))
    sols = []
    for solver, step in ((PARALLEL, 1.0), (dfx.Bosh3(), 1.0 / 12)):
        sols.append(dfx.diffeqsolve(term, solver, 0.0, jnp.inf, step, jnp.array([3.0, -1.0]), event=event))
    got, want = sols
    assert got.result == want.result == dfx.RESULTS.event_occurred
    # Ours is looked at after every window, so that it ends later.
    assert want.ts[-1] <= got.ts[-1] < want.ts[-1] + 1.0
    np.testing.assert_allclose(got.ys[-1], 1.0, atol=2e-4)


HALF = jnp.array([0.7 - 0.4j, -0.2 + 1.1j])


def test_complex_states_have_the_right_values_and_gradients_though_the_field_is_not_holomorphic():
    def field(t, y, a):
        size, real = (x.astype(y.dtype) for x in (jnp.abs(y), y.real))
        return -0.5j * jnp.conj(y) * size * a - y + 0.3 * real * y[::-1]

    term = dfx.ODETerm(field)

    def loss(solver, step, a, y0):
        y1 = dfx.diffeqsolve(term, solver, 0.0, 1.0, step, y0, a).ys[0]
        return jnp.sum(jnp.abs(y1) ** 2 * jnp.array([1.0, 2.0])) + y1[0].imag

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Complex dtype support in Diffrax")
        solver = parallel_solver(dfx.Bosh3(), 24, policy=pdx.policies.ParallelOnly())
        both = jax.jit(jax.value_and_grad(functools.partial(loss, solver, 1.0), (0, 1)))
        solve_in_parallel = lambda a, y0: both(a, y0)[0]
        value, gradient = both(1.3, HALF)
        want, expected = jax.jit(jax.value_and_grad(functools.partial(loss, dfx.Bosh3(), 1 / 24), (0, 1)))(1.3, HALF)
        np.testing.assert_allclose(value, want, rtol=1e-11)
        for a, b in zip(gradient, expected):
            np.testing.assert_allclose(a, b, rtol=1e-10)
        # JAX's gradient of a real function is the conjugate of the direction of steepest ascent.
        for direction in (jnp.array([1.0 + 0j, 0.0]), jnp.array([0.0, 1j])):
            step = 1e-5
            slope = (
                solve_in_parallel(1.3, HALF + step * direction) - solve_in_parallel(1.3, HALF - step * direction)
            ) / (2 * step)
            np.testing.assert_allclose(jnp.sum(gradient[1] * direction).real, slope, rtol=1e-7)


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")
@pytest.mark.parametrize("controller", [dfx.ConstantStepSize(), *only_full(dfx.PIDController(1e-3, 1e-3))])
def test_a_complex_state_may_have_a_real_error_estimate(controller):
    """`HalfSolver` estimates the magnitude of the error."""
    term, base = dfx.ODETerm(lambda t, y, args: 1j * y), dfx.HalfSolver(dfx.Heun())
    solvers = pdx.ParallelSolver(base, policy=pdx.policies.Sequential()), base
    solve = lambda solver: dfx.diffeqsolve(term, solver, 0.0, 1.0, 0.1, HALF, stepsize_controller=controller)
    got, want = (jax.jit(solve, static_argnums=0)(solver).ys for solver in solvers)
    np.testing.assert_allclose(got, want, rtol=1e-12 if isinstance(controller, dfx.ConstantStepSize) else 1e-3)
