"""With `ParallelAdjoint`, events are those of sequential Diffrax: the first of all crossings in a window, at its time, with
the state, outputs and derivatives there.
"""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx

from .problems import fitzhugh_nagumo, only_full, parallel_solver


CHEAP = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}
PARALLEL = pdx.ParallelAdjoint()
NEWTON = optx.Newton(1e-12, 1e-12)


def spring_or_ball(t, y, args):
    """A spring of stiffness `args[0]` under gravity `args[1]`."""
    return jnp.stack([y[1], -args[0] * y[0] - args[1]])


def below(t, y, args, **kwargs):
    return y[0] - args[2]


@functools.cache
def event_time_and_gradient():
    """Of one window of 1024 steps: the time at which the position falls through or rises to `args[2]`, its gradient, and the
    outputs."""
    solver = parallel_solver(dfx.Tsit5(), 1024, **CHEAP)

    def time(args, y0, t1):
        saveat = dfx.SaveAt(subs=(dfx.SubSaveAt(t1=True), dfx.SubSaveAt(ts=jnp.linspace(0.0, 1.0, 50) * t1)))
        kwargs = {"saveat": saveat, "event": dfx.Event(below, NEWTON), "adjoint": PARALLEL, "max_steps": 1}
        sol = dfx.diffeqsolve(dfx.ODETerm(spring_or_ball), solver, 0.0, t1, t1, y0, args, throw=False, **kwargs)
        return sol.ts[0][-1], sol

    return jax.jit(jax.value_and_grad(time, has_aux=True))


# A spring from rest at 1 passes 0.1 so often until then.
@pytest.mark.parametrize("crossings, t1", [(0, 1.0), (1, 2.0), (2, 5.0), (7, 21.0)])
def test_the_first_of_any_number_of_crossings_in_a_window_is_found(crossings, t1):
    level = 0.1
    exact = np.arccos(level)
    times = [exact, *(x for k in range(1, 9) for x in (2 * np.pi * k - exact, 2 * np.pi * k + exact))]
    assert sum(time < t1 for time in times) == crossings
    args = jnp.array([1.0, 0.0, level])
    (time, sol), gradient = event_time_and_gradient()(args, jnp.array([1.0, 0.0]), jnp.array(t1))
    saved = sol.ts[1]
    if crossings == 0:
        assert sol.result == dfx.RESULTS.successful and not sol.event_mask
        assert time == t1 and np.all(gradient == 0) and np.isfinite(saved).all()
        return
    assert sol.result == dfx.RESULTS.event_occurred and sol.event_mask
    assert abs(time - exact) < 1e-8
    # The time for the stiffness, for gravity (by the formula of an oscillation about -g / k), and for the level.
    slope = -np.sqrt(1 - level**2)
    want = [-exact / 2, -(1 - level) / slope * -1, 1 / slope]
    np.testing.assert_allclose(gradient, want, atol=1e-6)
    np.testing.assert_allclose(sol.ys[0][-1], [level, slope], atol=1e-8)
    np.testing.assert_array_equal(np.isfinite(saved), np.linspace(0.0, t1, 50) <= time)
    np.testing.assert_array_equal(np.isfinite(sol.ys[1]).all(axis=1), np.isfinite(saved))


def test_a_ball_hits_the_ground_at_the_right_time_with_the_right_gradient():
    gravity, height = 8.0, 10.0
    (time, sol), gradient = event_time_and_gradient()(
        jnp.array([0.0, gravity, 0.0]), jnp.array([height, 0.0]), jnp.array(7.0)
    )
    exact = np.sqrt(2 * height / gravity)
    assert abs(time - exact) < 1e-8
    np.testing.assert_allclose(gradient[1:], [-exact / (2 * gravity), -1 / (gravity * exact)], atol=1e-6)
    np.testing.assert_allclose(sol.ys[0][-1], [0.0, -gravity * exact], atol=1e-7)


# Conditions of both kinds, in a pytree, with directions: which of them ends the solve depends on the arguments.
def rises(t, y, args, **kwargs):
    return y[0] - args[0]


def falls(t, y, args, **kwargs):
    return y[1] - args[1]


def late(t, y, args, **kwargs):
    return t > args[2]


CONDITIONS = {
    "falls": falls,
    "late": [late],
    "rises": rises,
    "steady": dfx.steady_state_event(1e-3, 1e-3, optx.rms_norm),
}
DIRECTIONS = {"falls": False, "late": [None], "rises": True, "steady": None}
NEVER = 1e9
LEVELS = jnp.array(
    [
        [1.5, -NEVER, NEVER, 0.0],  # up through a level, in one of several windows
        [NEVER, 1.0, NEVER, 0.0],  # down through one
        [NEVER, -NEVER, 3.3, 0.0],  # a boolean
        [NEVER, -NEVER, NEVER, 0.0],  # nothing
        [NEVER, -NEVER, -1.0, 0.0],  # true at the beginning
        [NEVER, -NEVER, NEVER, 3.0],  # a steady state
    ]
)


def damped(t, y, args):
    return fitzhugh_nagumo(t, y) - args[3] * y


def ended(root_finder, parallel, batched):
    steps, windows, t1 = 64, 5, 100.0
    solver = parallel_solver(dfx.Heun(), steps, **CHEAP) if parallel else dfx.Heun()
    per_window = 1 if parallel else steps
    # Steps are the ends of windows; `t1` is the event.
    subs = (dfx.SubSaveAt(t0=True, t1=True, ts=jnp.linspace(0.0, t1, 300)), dfx.SubSaveAt(steps=per_window, t1=True))

    def solve(levels):
        return dfx.diffeqsolve(
            *(dfx.ODETerm(damped), solver, 0.0, t1, t1 / windows / per_window),
            *(jnp.array([-1.0, 1.0]), levels),
            saveat=dfx.SaveAt(subs=subs, dense=True), event=dfx.Event(CONDITIONS, root_finder, DIRECTIONS),
            max_steps=windows * per_window, adjoint=PARALLEL if parallel else dfx.ForwardMode(), throw=False,
        )  # fmt: skip

    if batched:
        return jax.jit(jax.vmap(solve))(LEVELS)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(jax.jit(solve), LEVELS))


@pytest.mark.parametrize(
    "root_finder, batched", only_full((None, False), (NEWTON, True)), ids=["no root finder", "Newton, in a batch"]
)
def test_events_of_every_kind_end_a_solve_of_several_windows_as_they_end_sequential_diffrax(root_finder, batched):
    got, want = (ended(root_finder, parallel, batched) for parallel in (True, False))
    np.testing.assert_array_equal(got.result._value, want.result._value)
    masks = [np.stack(jax.tree.leaves(sol.event_mask)) for sol in (got, want)]
    np.testing.assert_array_equal(*masks)
    assert masks[0].sum(axis=0).tolist() == [1, 1, 1, 0, 1, 1]
    for one, other in zip(jax.tree.leaves((got.ts, got.ys)), jax.tree.leaves((want.ts, want.ys))):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    # Dense output ends with the fine step in which the event is, too.
    ends = [
        np.max(sol.interpolation.ts, axis=1, where=np.isfinite(sol.interpolation.ts), initial=0) for sol in (got, want)
    ]
    np.testing.assert_allclose(*ends, rtol=1e-9)


def test_a_field_that_is_not_defined_beyond_the_event_and_a_condition_that_becomes_nan():
    """A tank empties, `h' = -sqrt(h)` from 1: `h = (1 - t / 2)^2`; after a while, nobody knows."""
    solver = parallel_solver(
        dfx.Heun(), 1000, predictor=pdx.ConstantPredictor(), policy=pdx.policies.ParallelThenSequential()
    )
    term = dfx.ODETerm(lambda t, y, args: jnp.where(t > 1.7, jnp.nan, -jnp.sqrt(y)))
    ts = jnp.linspace(0.0, 4.0, 22)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def solve(levels):
        def cond_fn(t, y, args, **kwargs):
            return jnp.where(y < levels[1], jnp.nan, y - args)

        subs = (dfx.SubSaveAt(t1=True), dfx.SubSaveAt(ts=ts, fn=lambda t, y, args: args * y))
        kwargs = {"event": dfx.Event(cond_fn, NEWTON), "adjoint": PARALLEL, "max_steps": 1, "throw": False}
        sol = dfx.diffeqsolve(term, solver, 0.0, 4.0, 4.0, 1.0, levels[0], saveat=dfx.SaveAt(subs=subs), **kwargs)
        (end,), saved = sol.ts
        return end + jnp.sum(jnp.where(jnp.isfinite(saved), sol.ys[1], 0.0)), (end, sol.result)

    (_, (time, result)), gradient = solve(jnp.array([0.25, -1.0]))
    assert result == dfx.RESULTS.event_occurred
    assert abs(time - 1.0) < 1e-5
    # The time is `2 - 2 sqrt(level)`; what is saved is linear in the level.
    np.testing.assert_allclose(gradient, [-2 + np.sum((1 - ts[ts <= 1.0] / 2) ** 2), 0.0], atol=1e-4)
    # No event up to where the state, or the condition, is NaN: a failure, and no event.
    for levels in ([-1.0, -2.0], [0.25, 0.5]):
        assert solve(jnp.array(levels))[0][1][1] == dfx.RESULTS.nonfinite


def test_a_window_that_was_not_solved_has_no_events():
    solver = parallel_solver(dfx.Heun(), 200, root_find_max_steps=1, **CHEAP)
    event = dfx.Event(lambda t, y, args, **kwargs: y[0] - 0.5)
    sol = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: fitzhugh_nagumo(t, y)), solver, 0.0, 60.0, 60.0, jnp.array([-1.0, 1.0]),
        event=event, adjoint=PARALLEL, throw=False, max_steps=1,
    )  # fmt: skip
    assert sol.result != dfx.RESULTS.event_occurred and sol.result != dfx.RESULTS.successful
    assert not sol.event_mask


def test_a_search_that_fails_has_nan_derivatives_and_the_other_members_of_a_batch_have_theirs():
    """`y' = -y` from 1 reaches a level at `t = -log(level)`. Newton's method jumps to and fro across a steep arctangent."""

    def time(level, steepness):
        def cond_fn(t, y, args, **kwargs):
            return jnp.arctan(steepness * (y - level))

        term, event = dfx.ODETerm(lambda t, y, args: -y), dfx.Event(cond_fn, NEWTON)
        sol = pdx.diffeqsolve(term, dfx.Tsit5(), 0.0, 3.0, 0.01, 1.0, event=event, throw=False)
        return sol.ts[0], (sol.ys[0], sol.result)

    levels, steepness = jnp.array([0.5, 0.25, 0.1]), jnp.array([1.0, 1e9, 1.0])
    (times, (ys, result)), gradient = jax.jit(jax.vmap(jax.value_and_grad(time, has_aux=True)))(levels, steepness)
    is_found = steepness == 1
    np.testing.assert_array_equal(result == dfx.RESULTS.event_occurred, is_found)
    np.testing.assert_array_equal(np.isnan(gradient), ~is_found)
    found = np.flatnonzero(is_found)
    np.testing.assert_allclose(times[found], -np.log(levels[found]), rtol=1e-9)
    np.testing.assert_allclose(ys[found], levels[found], rtol=1e-9)
    np.testing.assert_allclose(gradient[found], -1 / levels[found], rtol=1e-6)


def test_the_condition_of_a_half_solver_is_that_of_its_states():
    """`y' = -2.5 y` from 1, in steps of 1: two half steps of Heun's method decay, and the whole step, whose interpolant is
    the dense output, grows."""
    solver, term = dfx.HalfSolver(dfx.Heun()), dfx.ODETerm(lambda t, y, args: -2.5 * y)
    never = dfx.Event(lambda t, y, args, **kwargs: y - 1.2)
    happens = dfx.Event(lambda t, y, args, **kwargs: y - 0.1)

    def end(solve, event):
        sol = solve(term, solver, 0.0, 4.0, 1.0, 1.0, event=event)
        return sol.ts[0], sol.ys[0], sol.result == dfx.RESULTS.event_occurred, sol.stats["num_steps"]

    ends = jax.jit(
        lambda: [[end(solve, e) for e in (never, happens)] for solve in (pdx.diffeqsolve, dfx.diffeqsolve)]
    )()
    np.testing.assert_allclose(*ends, rtol=1e-12)
    assert not ends[0][0][2] and ends[0][1][2]
