"""A vector field that jumps in time (doses, switched inputs) costs `AdaptivePredictor` no storm of windows, with and without
`jump_ts`. Values and derivatives are those of the problem.
"""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx
from parallel_diffrax._ode._predictor._jumps import divide, locate_jumps

from .problems import only_full, parallel_solver


def pulse(t, y, p):
    return p * jnp.where((t >= 1) & (t < 2), 50.0, 0.0) - y


def binding(t, y, p):
    """A dose in the first hour of each day, with stiff binding."""
    c, q, b = y
    bind = 300 * c * (10 - b) - 200 * b
    u = jnp.where(jnp.mod(t, 24.0) < 1, 50.0, 0.0)
    return jnp.stack([u - p * c - 0.1 * (c - q) - bind, 0.1 * (c - q), bind])


PULSE = jnp.array([1.0, 2.0])
TOLERANCES = {"rtol": 1e-6, "atol": 1e-8}


def parallel(solver):
    root_finder = dfx.with_stepsize_controller_tols(pdx.ParallelNewton)()
    return parallel_solver(solver, 64, root_finder, predictor=pdx.AdaptivePredictor())


def solve(
    field, solver, t1, y0, p, jumps=None, tolerances=TOLERANCES, max_steps=100, diffeqsolve=dfx.diffeqsolve, **options
):
    controller = dfx.PIDController(**tolerances)
    if jumps is not None:
        controller = dfx.ClipStepSizeController(controller, jump_ts=jumps)
    return diffeqsolve(
        dfx.ODETerm(field), solver, 0.0, t1, 0.01, y0, p, stepsize_controller=controller, max_steps=max_steps, **options
    )


@functools.partial(jax.jit, static_argnums=0)
def exact(num_pulses, t1, p):
    """The solution for a pulse that ends before `t1`: `y' = 50 p - y` on [1, 2), else `y' = -y`."""
    return 50 * p * (jnp.exp(2 - t1) - jnp.exp(1 - t1)) * num_pulses + jnp.exp(-t1)


@pytest.mark.parametrize("jumps", [None, *only_full((PULSE,))], ids=["", "jump_ts"])
@pytest.mark.parametrize("base", [dfx.Tsit5(), *only_full(dfx.Kvaerno5())], ids=["Tsit5", "Kvaerno5"])
def test_a_pulse_costs_no_window_and_values_and_derivatives_are_exact(base, jumps):
    def value(p, t1, solver, **options):
        sol = solve(pulse, solver, t1, jnp.ones(1), p, jumps, **options)
        return sol.ys[-1, 0], sol.stats

    @jax.jit
    def both(p, t1):
        got = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
        return got(p, t1, parallel(base), adjoint=pdx.ParallelAdjoint())

    p, t1 = jnp.array(0.3), jnp.array(3.0)
    (got, stats), gradient = both(p, t1)
    want, want_gradient = jax.value_and_grad(exact, argnums=(1, 2))(1, t1, p)
    # Not more than from window to window at most ten times as long, and one window per part.
    assert int(stats["num_accepted_steps"]) <= (6 if isinstance(base, dfx.Tsit5) else 12)
    assert int(stats["num_rejected_steps"]) <= (0 if isinstance(base, dfx.Tsit5) else 2)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(gradient, want_gradient[::-1], rtol=1e-5)
    sequential, stats_ = jax.jit(lambda p, t1: value(p, t1, base, max_steps=1000))(p, t1)
    assert abs(got - want) <= abs(sequential - want) + 1e-9
    if jumps is None:
        assert 64 * int(stats["num_steps"]) <= 4 * int(stats_["num_steps"]) + 64 * 3


@pytest.mark.full
@pytest.mark.parametrize("front_door", [False, True], ids=["", "front door"])
@pytest.mark.parametrize("doses", [1, 10])
@pytest.mark.parametrize("known", [False, True], ids=["", "jump_ts"])
def test_doses_with_stiff_binding_take_fewer_and_more_accurate_steps_or_those_of_diffrax(doses, known, front_door):
    days = 24.0 * np.arange(doses)
    knows = jnp.asarray(np.sort(np.concatenate([days, days + 1])))

    def value(p, solver, jumps=knows if known else None, **options):
        sol = solve(binding, solver, 24.0 * doses - 1, jnp.zeros(3), p, jumps, throw=False, **options)
        return sol.ys[-1, 0], sol

    def sequential(p, solver, **options):
        end, sol = value(p, solver, **options)
        return end, sol.stats["num_steps"]

    if front_door:
        solver, options = dfx.Kvaerno5(), {"diffeqsolve": pdx.diffeqsolve, "max_steps": 10_000 * doses}
    else:
        solver, options = parallel(dfx.Kvaerno5()), {"adjoint": pdx.ParallelAdjoint(), "max_steps": 60 * doses}
    p = jnp.array(0.05)
    (got, sol), gradient = jax.jit(lambda p: jax.value_and_grad(value, has_aux=True)(p, solver, **options))(p)
    assert sol.result == dfx.RESULTS.successful
    end, count = jax.jit(lambda p: sequential(p, dfx.Kvaerno5(), max_steps=10_000 * doses))(p)
    steps = int(sol.stats["num_steps"])

    # (Explicit steps: the sequential implicit solve does not reach a tight tolerance. Differences: the derivative of Diffrax
    # in forward mode, of the lengths of steps too, is off by 1e-5, whatever the tolerance.)
    tight = {"jumps": knows, "tolerances": {"rtol": 1e-10, "atol": 1e-12}, "max_steps": 200_000 * doses}
    values = jax.jit(lambda p: sequential(p, dfx.Tsit5(), **tight)[0])
    slopes = [(values(p + h) - values(p - h)) / (2 * h) for h in (1e-3, 5e-4)]
    want, derivative = values(p), (4 * slopes[1] - slopes[0]) / 3
    if front_door:
        # By default the steps are those of Diffrax.
        assert abs(steps - int(count)) <= 2 * doses
        np.testing.assert_allclose(got, end, rtol=1e-8)
        np.testing.assert_allclose(gradient, derivative, rtol=1e-4)
        return
    assert 64 * steps <= 0.6 * int(count)
    np.testing.assert_allclose(got, want, rtol=1e-7)
    np.testing.assert_allclose(gradient, derivative, rtol=1e-6)
    assert abs(got - want) <= abs(end - want)


def test_jumps_are_located_between_neighbouring_numbers_and_smooth_fields_have_none():
    ts, ys = jnp.linspace(0.0, 3.0, 41), jnp.ones((41, 1))
    jumps = jax.jit(lambda: locate_jumps(lambda t, y: pulse(t, y, 0.3) + jnp.sin(9 * t), ts, ys))()
    found = np.asarray(jumps.found)
    np.testing.assert_array_equal(np.asarray(jumps.before)[found], np.nextafter([1.0, 2.0], 0.0))
    np.testing.assert_array_equal(np.asarray(jumps.after)[found], [1.0, 2.0])
    fields = (
        lambda t, y: y,
        lambda t, y: y * jnp.sin(300 * t),
        lambda t, y: jnp.exp(9 * t) - y,
        lambda t, y: y / (t - 1),
    )
    for field in fields[:3]:
        assert not np.any(jax.jit(lambda field=field: locate_jumps(field, ts, ys))().found)
    # A pole is no jump between finite numbers, and does no harm.
    jax.block_until_ready(jax.jit(lambda: locate_jumps(fields[3], ts, ys))())


def test_a_grid_ends_steps_at_all_nodes_and_distributes_the_others():
    nodes = jnp.array([0.0, 0.0, 1.0, 1.0, 1.5, 3.0, 3.0])
    density = jnp.array([0.0, 0.0, 3.0, 3.0, 3.0, 6.0, 6.0])
    ts, enough = divide(nodes, density, jnp.array(9), 12)
    want = [0, 0.25, 0.5, 0.75, 1, 1.5, 1.875, 2.25, 2.625, 3, 3, 3, 3]
    np.testing.assert_allclose(ts, want)
    assert bool(enough) and not bool(divide(nodes, density, jnp.array(2), 12)[1])
