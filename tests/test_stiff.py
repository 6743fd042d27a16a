"""Implicit methods solved all at once have their order, agree with sequential Diffrax on stiff problems to the accuracy that
tolerances ask for, on a grid that follows the solution, and have its derivatives; what cannot be solved fails."""

import dataclasses
import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx
from benchmarks.stiff import adaptive, sequential
from benchmarks.stiff_problems import PROBLEMS, robertson
from parallel_diffrax._ode._step_map import DiagonallyImplicitStep, make_step_map
from parallel_diffrax._ode._window import uniform_times, Window
from parallel_diffrax._recurrence import Recurrence

from .problems import only_full, parallel_solver, relative_difference


ORDERS = {dfx.ImplicitEuler: 1, dfx.Kvaerno3: 3, dfx.Kvaerno4: 4, dfx.Kvaerno5: 5}
SPLIT_ORDERS = {dfx.Sil3: 2, dfx.KenCarp3: 3, dfx.KenCarp4: 4, dfx.KenCarp5: 5}


def end_state(solver, terms, y0, t1, num_steps):
    """The state after so many equal steps of the step map, in sequence; the number may be traced."""
    step_map = make_step_map(solver, terms, y0, None, pdx.ParallelNewton())
    assert isinstance(step_map, DiagonallyImplicitStep)
    h = t1 / num_steps

    def step(i, y):
        return step_map(i * h, (i + 1) * h, y).y1

    return jax.lax.fori_loop(0, num_steps, step, y0)


@pytest.mark.parametrize("solver", [*ORDERS, *SPLIT_ORDERS], ids=lambda s: s.__name__)
def test_methods_have_their_order_on_a_nonlinear_problem_that_depends_on_time(solver):
    # y = (exp(sin t), cos t): a field with known solution.
    def slow(t, y, args):
        return jnp.stack([y[0] * y[1], -jnp.sin(t)])

    def fast(t, y, args):
        return jnp.stack([0.0 * t, -2 * (y[1] ** 3 - jnp.cos(t) ** 3)])

    if solver in ORDERS:
        terms = dfx.ODETerm(lambda t, y, args: slow(t, y, args) + fast(t, y, args))
    else:
        terms = dfx.MultiTerm(dfx.ODETerm(slow), dfx.ODETerm(fast))
    order = (ORDERS | SPLIT_ORDERS)[solver]
    y0, t1 = jnp.array([1.0, 1.0]), 2.0
    exact = jnp.array([jnp.exp(jnp.sin(t1)), jnp.cos(t1)])
    run = jax.jit(lambda n: jnp.linalg.norm(end_state(solver(), terms, y0, t1, n) - exact))
    errors = [float(run(n)) for n in (80, 160)]
    # Diffrax calls `Sil3` of order 2; on this problem it does better.
    assert order - 0.35 < np.log2(errors[0] / errors[1]) < order + 1.2, errors


@pytest.mark.parametrize("solver", [dfx.ImplicitEuler, dfx.Kvaerno3, dfx.Kvaerno5], ids=lambda s: s.__name__)
def test_stiffness_costs_order_but_not_accuracy(solver):
    # Prothero and Robinson: y' = l (y - cos t) - sin t. Stages are of order 1, for the implicit Euler method, or 2.
    terms = dfx.ODETerm(lambda t, y, args: -1e6 * (y - jnp.cos(t)) - jnp.sin(t))
    run = jax.jit(lambda n: jnp.abs(end_state(solver(), terms, jnp.array([1.0]), 1.0, n)[0] - jnp.cos(1.0)))
    errors = [float(run(n)) for n in (25, 50)]
    # The error is of the stage order, divided by how stiff the problem is.
    expected = {dfx.ImplicitEuler: 1, dfx.Kvaerno3: 2, dfx.Kvaerno5: 2}[solver]
    assert errors[1] < 1e-6 and np.log2(errors[0] / errors[1]) > expected - 0.3, errors


# HIRES with its matrices in place of its equations, which are forty operations to trace and compile wherever the field is.
CONSTANT = np.diag([0, -8.75, -10.03, -1.12, -1.745, -0.43, -1.81, 0.0])
CONSTANT[[0, 2, 2, 4, 4, 7], [1, 3, 4, 5, 6, 6]] = 0.43, 0.43, 0.035, 0.43, 0.43, 1.81
BY_RATE = np.zeros((3, 8, 8))
BY_RATE[0, [0, 1, 3, 5], [0, 0, 2, 4]] = -1, 1, 1, 1
BY_RATE[1, [0, 3], [2, 1]] = 1
BY_RATE[2, 5, [3, 6]] = 1
SOURCE, EXCHANGE = 0.0007 * np.eye(8)[0], np.array([0, 0, 0, 0, 0, -1, 1, -1.0])


def hires(t, y, rates):
    return (CONSTANT + jnp.tensordot(rates[:3], BY_RATE, 1)) @ y + rates[3] * y[5] * y[7] * EXCHANGE + SOURCE


STIFF = {
    "Robertson, T = 1e5": PROBLEMS["Robertson, T = 1e5"],
    "HIRES": dataclasses.replace(PROBLEMS["HIRES"], field=hires),
}


def test_hires_in_matrices_is_hires():
    y, rates = np.random.default_rng(0).normal(size=8), np.arange(1.0, 5.0)
    np.testing.assert_allclose(hires(0.0, y, rates), PROBLEMS["HIRES"].field(0.0, y, rates), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", [name if name != "HIRES" else only_full(name)[0] for name in STIFF])
def test_tolerances_are_honoured_as_sequential_diffrax_honours_them(name):
    problem = STIFF[name]
    reference = problem.reference(1e-10)
    ys, success, _, state = jax.jit(adaptive(problem, 256))(problem.y0)
    base, base_success, _, _ = jax.jit(sequential(problem, 1e-6))(problem.y0)
    assert bool(success) and bool(base_success)
    assert problem.error(ys, reference) <= 5 * problem.error(base, reference)
    assert int(state.sequential_steps) <= 0.1 * int(state.parallel_steps)
    assert int(state.iterations) <= 5 * int(state.windows)


RATES, Y0 = PROBLEMS["Robertson, T = 1e5"].args, jnp.array([1.0, 0.0, 0.0])
# Each solved in one window up to some time, with what is made of the end state.
WINDOWS = {
    "Robertson, T = 1e5": (100.0, 128, np.array([1.0, 1e4, 0.0])),
    "HIRES": (20.0, 192, np.array([1.0, -2.0, 3.0, 1.0, 0.5, 1.0, 30.0, 0.0])),
}
# To what Diffrax's own Newton iteration gets in sequence.
ATTAINABLE = {"Robertson, T = 1e5": (1e-11, 1e-16), "HIRES": (1e-10, 1e-13)}


@functools.cache
def one_window(name):
    """A problem in one window: the weighted end state as a function of the rates, and the solution."""
    problem, (t1, num_steps, weights) = STIFF[name], WINDOWS[name]
    solver = parallel_solver(
        dfx.Kvaerno5(),
        num_steps,
        predictor=pdx.AdaptivePredictor(rtol=1e-3, atol=1e-9),
        policy=pdx.policies.ParallelOnly(),
    )

    def loss(rates):
        sol = dfx.diffeqsolve(
            problem.term, solver, 0.0, t1, t1, jnp.asarray(problem.y0), rates,
            saveat=dfx.SaveAt(t1=True, dense=True, solver_state=True), max_steps=1, adjoint=dfx.DirectAdjoint(), throw=False,
        )  # fmt: skip
        return weights @ sol.ys[-1], sol

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.full
@pytest.mark.parametrize("name", list(WINDOWS))
def test_the_gradient_by_rate_constants_is_that_of_the_same_grid_in_sequence_and_that_of_the_problem(name):
    problem, (t1, num_steps, weights) = STIFF[name], WINDOWS[name]
    rates = np.asarray(problem.args)
    (_, sol), gradient = one_window(name)(rates)
    gradient = np.asarray(gradient)
    assert sol.result == dfx.RESULTS.successful
    assert int(pdx.statistics(sol).parallel_steps) == num_steps and int(pdx.statistics(sol).iterations) <= 5
    ts = np.asarray(pdx.refine(sol).interpolation.ts)[: num_steps + 1]
    steps = np.diff(ts)
    assert (steps > 0).all() and steps[-1] > 20 * steps[0]

    base = dfx.Kvaerno5(root_finder=optx.Newton(*ATTAINABLE[name]), root_find_max_steps=30)

    def in_sequence(rates):
        return weights @ (
            dfx.diffeqsolve(
                problem.term, base, 0.0, t1, None, jnp.asarray(problem.y0), rates,
                stepsize_controller=dfx.StepTo(ts), adjoint=dfx.ForwardMode(), max_steps=num_steps + 1,
            ).ys[-1]
        )  # fmt: skip

    forward, value = jax.jit(jax.jacfwd(lambda rates: (in_sequence(rates),) * 2, has_aux=True))(rates)
    np.testing.assert_allclose(weights @ np.asarray(sol.ys[-1]), value, rtol=1e-9)
    np.testing.assert_allclose(gradient * rates, forward * rates, rtol=1e-7)

    # By finite differences of tight solves in SciPy: their errors, divided by 2e-3, are far below 1e-4.
    for k in range(len(rates)):
        values = []
        for factor in (1 - 1e-3, 1 + 1e-3):
            changed = np.array(rates)
            changed[k] *= factor
            end = type(problem)(problem.field, problem.y0, t1, problem.atol, changed).reference(1e-9)
            values.append(float(weights @ end))
        assert abs((values[1] - values[0]) / 2e-3 - gradient[k] * rates[k]) <= 1e-4 * np.max(np.abs(gradient * rates))


def test_an_iteration_evaluates_the_field_a_fixed_number_of_times():
    step_map = make_step_map(dfx.Kvaerno5(), dfx.ODETerm(robertson), Y0, RATES, pdx.ParallelNewton())
    recurrence = Recurrence.make(
        lambda y, x: step_map.increment(*x, y), Y0, (jnp.arange(4.0), jnp.arange(1.0, 5.0)), 4, True, step_map.stages
    )
    y = jnp.broadcast_to(Y0, (4, 3))
    iteration = str(jax.make_jaxpr(lambda y: recurrence.linearised(y, recurrence.guess_stages(y)))(y))
    # Loops over stages have a fixed length (`scan`); one that looks for convergence would be a `while`.
    assert "scan" in iteration and "while" not in iteration
    assert "while" in str(jax.make_jaxpr(lambda y: step_map(0.0, 1.0, y).y1)(Y0))


def fails(field, y0, predictor, policy):
    """Each case with its own fate, in one program: how many were successful."""
    solver = parallel_solver(dfx.Kvaerno3(), 16, predictor=predictor, policy=policy)

    def solve(case):
        # The case as an argument: a field that closes over something traced is another one in each trace of a step.
        term = dfx.ODETerm(lambda t, y, args: field(args, t, y))
        sol = dfx.diffeqsolve(term, solver, 0.0, 1.0, 1.0, y0, case, throw=False, max_steps=1)
        return sol.result == dfx.RESULTS.successful, sol.ys

    return jax.jit(jax.vmap(solve))(jnp.arange(4))


@pytest.mark.parametrize(
    "predictor, policy",
    [
        *only_full((pdx.CoarsePredictor(), pdx.AdaptivePolicy())),
        (pdx.AdaptivePredictor(), pdx.policies.ParallelThenSequential()),
    ],
    ids=["coarse", "adaptive"],
)
def test_singular_systems_and_fields_that_are_not_finite_are_no_success(predictor, policy):
    gamma = float(dfx.Kvaerno3.tableau.a_diagonal[1])

    def field(case, t, y):
        decay = -y
        # The matrix of each stage is exactly singular on a uniform grid.
        singular = 16 / gamma * (y - 1) + t
        undefined = jnp.where(t > 0.5, jnp.nan, -y)
        escaping = y**2 * 4
        return jnp.select([case == 0, case == 1, case == 2], [decay, singular, undefined], escaping)

    success, ys = fails(field, jnp.array([1.0]), predictor, policy)
    assert bool(success[0]) and abs(float(ys[0, -1, 0]) - np.exp(-1)) < 1e-4
    assert not bool(success[2]) and not bool(success[3])
    # On the adaptive grid, no step has the length at which the system is singular.
    assert isinstance(predictor, pdx.AdaptivePredictor) or not bool(success[1])


def test_a_stage_at_which_the_slope_is_infinite_is_solved():
    """`y' = 1 - y - sqrt(y)` from 0, where Newton's correction is zero, but the equation does not hold."""
    num_steps, h, y = 40, 0.05, 0.0
    for _ in range(num_steps):
        # The step of implicit Euler, a quadratic equation for the root.
        root = (np.sqrt(h**2 + 4 * (1 + h) * (y + h)) - h) / (2 * (1 + h))
        y = root**2
    term, span = dfx.ODETerm(lambda t, y, args: 1 - y - jnp.sqrt(y)), num_steps * h
    euler = dfx.ImplicitEuler(optx.Newton(1e-10, 1e-10))
    sol = pdx.diffeqsolve(term, euler, 0.0, span, h, 0.0)
    np.testing.assert_allclose(sol.ys[0], y, rtol=1e-9)
    # All at once, no first guess but the right one has a finite slope.
    solver = parallel_solver(euler, num_steps, policy=pdx.policies.ParallelOnly())
    sol = dfx.diffeqsolve(term, solver, 0.0, span, span, 0.0, max_steps=1, throw=False)
    assert sol.result != dfx.RESULTS.successful


def test_the_grid_follows_the_solution_and_the_guess_keeps_its_sign():
    problem = PROBLEMS["Robertson, T = 1e5"]
    step_map = make_step_map(dfx.Kvaerno5(), problem.term, Y0, RATES, pdx.ParallelNewton())

    def prepare(y0):
        window = Window.make(step_map, dfx.Kvaerno5().interpolation_cls, uniform_times(0.0, 1e5, 300), y0, 300)
        ts, predictor = pdx.AdaptivePredictor(rtol=1e-3, atol=1e-9).prepare(window)
        window = window.with_times(ts)
        return window.ts, predictor.predict(window, window.recurrence(), 0).y

    ts, guess = jax.jit(prepare)(Y0)
    steps = np.diff(ts)
    assert ts[0] == 0 and ts[-1] == 1e5 and (steps > 0).all() and steps[0] < 1e-2 < 1e2 < steps[-1]
    assert (np.asarray(guess) >= 0).all()
    exact = PROBLEMS["Robertson, T = 1e5"].reference(1e-9)
    assert relative_difference(guess[-1], exact) < 0.05


def test_what_cannot_choose_a_grid_is_refused():
    for arguments in ({"rtol": -1.0}, {"atol": float("nan")}, {"rtol": 0.0, "atol": 0.0}):
        with pytest.raises(ValueError, match="AdaptivePredictor"):
            pdx.AdaptivePredictor(**arguments)
    solver = parallel_solver(dfx.LeapfrogMidpoint(), 16, predictor=pdx.AdaptivePredictor())
    with pytest.raises(ValueError, match="the grid can be chosen by the solution only"):
        dfx.diffeqsolve(dfx.ODETerm(lambda t, y, args: -y), solver, 0.0, 1.0, 1.0, jnp.ones(2))
    listed = parallel_solver(dfx.Tsit5(), 16, predictor=pdx.AdaptivePredictor(), ts=jnp.linspace(0.0, 1.0, 17))
    with pytest.raises(ValueError, match="chooses the fine steps by itself"):
        dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -y), listed, 0.0, 1.0, None, jnp.ones(2), stepsize_controller=pdx.Windows()
        )


@pytest.mark.parametrize("solver", [dfx.Kvaerno3(), *only_full(dfx.Kvaerno5())], ids=lambda s: type(s).__name__)
def test_outputs_between_steps_of_a_stiff_problem_are_those_of_diffrax(solver):
    """The field at a state multiplies its error by the stiffness. An interpolant takes the last slope of the step before."""

    def run(diffeqsolve, saveat):
        controller = dfx.PIDController(rtol=1e-5, atol=1e-10)
        return diffeqsolve(
            dfx.ODETerm(robertson), solver, 0.0, 1e4, 1e-5, jnp.array([1.0, 0.0, 0.0]), jnp.array([0.04, 3e7, 1e4]),
            saveat=saveat, stepsize_controller=controller, max_steps=4096,
        )  # fmt: skip

    ts = jnp.logspace(-2, 4, 61)
    ours, theirs = (run(f, dfx.SaveAt(ts=ts)) for f in (pdx.diffeqsolve, dfx.diffeqsolve))
    assert ours.stats["num_accepted_steps"] == theirs.stats["num_accepted_steps"]
    # Relative to each number: the second substance is never more than 4e-5.
    np.testing.assert_allclose(ours.ys, theirs.ys, rtol=1e-6)
    dense = run(pdx.diffeqsolve, dfx.SaveAt(t1=True, dense=True))
    np.testing.assert_allclose(jax.vmap(dense.evaluate)(ts), theirs.ys, rtol=1e-6)


def test_dense_output_is_that_of_the_same_step_where_stages_have_several_solutions():
    """One long step of `y' = 3 sin(3 y)`. From the line to its end, Newton's method may find the stages of another step."""
    term, solver = (
        dfx.ODETerm(lambda t, y, args: 3 * jnp.sin(3 * y)),
        dfx.Kvaerno3(root_finder=optx.Newton(1e-10, 1e-10)),
    )

    @jax.jit
    @jax.vmap
    def ends(h):
        saveat = dfx.SaveAt(t1=True, dense=True)
        sol = pdx.diffeqsolve(term, solver, 0.0, h, h, -1.5, saveat=saveat, throw=False)
        return sol.result == dfx.RESULTS.successful, sol.ys[0], sol.evaluate(h)

    solved, y, evaluated = ends(jnp.linspace(0.05, 6.0, 120))
    assert np.sum(solved) > 60
    np.testing.assert_allclose(evaluated[solved], y[solved], rtol=1e-7, atol=1e-7)
