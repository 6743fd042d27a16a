"""Every part can be replaced by a user's own, written from public names only: a Jacobian, a scan, a root finder, a policy, a
predictor and a step map. Each solves a problem, and its answer is that of the base solver step by step.
"""

import functools
from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, parallel_solver


T1, NUM_STEPS = 4.0, 200


class LowerTriangular(pdx.jacobians.AbstractJacobian):
    """The lower triangle of every Jacobian: a quasi-Newton method."""

    def linearise(self, residual, y):
        r, transitions, aux = pdx.jacobians.Dense().linearise(residual, y)
        return r, pdx.jacobians.DenseTransitions(jnp.tril(transitions.dense())), aux


class Doubling(pdx.scans.AbstractScan):
    """Recursive doubling: at distance 1, 2, 4, ... every element is composed with the one before it."""

    def prefix(self, compose, elements, *, reverse=False):
        flip = functools.partial(jax.tree.map, lambda x: x[::-1])
        elements = flip(elements) if reverse else elements
        length, distance = jax.tree.leaves(elements)[0].shape[0], 1
        while distance < length:
            first, then = (
                jax.tree.map(lambda x, s=s: x[s], elements) for s in (slice(-distance), slice(distance, None))
            )
            head = jax.tree.map(lambda x, n=distance: x[:n], elements)
            elements = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), head, compose(first, then))
            distance *= 2
        return flip(elements) if reverse else elements


class Halved(pdx.root_finders.AbstractParallelRootFinder):
    """Newton's method with half of every update: linear convergence."""

    rtol: float = 1e-10
    atol: float = 0.0
    norm: Callable = optx.max_norm
    jacobian: pdx.jacobians.AbstractJacobian = pdx.jacobians.Dense()
    scan: pdx.scans.AbstractScan = pdx.scans.AutoScan()

    @property
    def exact(self):
        return False

    def iterate(self, residual, r, transitions, y, tolerance, largest, method_state):
        d = 0.5 * self.scan.solve(transitions, r)
        y, applied = pdx.root_finders.safeguarded_update(y, r, transitions.finite(), d, largest)
        return y, d, applied, method_state


class FirstHalf(pdx.policies.AbstractPolicy):
    """The first half of the steps in parallel, the second half sequentially."""

    def solve(self, driver):
        half = driver.length // 2
        attempt = driver.solve_in_parallel(0, driver.init, half, half)
        y = jnp.concatenate([attempt.y, jnp.broadcast_to(driver.init, (driver.length - half, driver.init.size))])
        y, _, _ = driver.step_sequentially(driver.buffer(y), attempt.num_solved, driver.length)
        return pdx.policies.RecurrenceSolution.complete(y[: driver.length], attempt.counts)


class Straight(pdx.predictors.AbstractPredictor):
    """A straight line with the slope of the first step."""

    def predict(self, window, recurrence, start_level):
        first = recurrence.step(recurrence.init, jax.tree.map(lambda x: x[0], recurrence.inputs))
        count = jnp.arange(1, recurrence.length + 1, dtype=first.dtype)[:, None]
        y = recurrence.init[None] + count * (first - recurrence.init)[None]
        return pdx.predictors.Prediction(y, jnp.array(1), jnp.array(recurrence.length), jnp.asarray(start_level))


class Midpoint(dfx.AbstractWrappedSolver):
    """Diffrax's midpoint rule with a step map of its own, which counts nothing and stores nothing."""

    solver: dfx.AbstractSolver = dfx.Midpoint()
    term_structure = dfx.AbstractTerm
    interpolation_cls = dfx.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        out = MidpointStep(self, terms, args)(t0, t1, y0)
        return out.y1, out.y_error, out.dense_info, None, out.result

    def step_map(self, terms, y0, args):
        return MidpointStep(self, terms, args)


# A step is traced once for each entry.
TRACED = []


class MidpointStep(pdx.step_maps.AbstractStepMap):
    solver: Midpoint
    terms: dfx.AbstractTerm
    args: jax.Array

    def __call__(self, t0, t1, y0, y1=None):
        TRACED.append(t0)
        control = self.terms.contr(t0, t1)
        half = jax.tree.map(lambda y, k: y + 0.5 * k, y0, self.terms.vf_prod(t0, y0, self.args, control))
        k = self.terms.vf_prod(t0 + 0.5 * (t1 - t0), half, self.args, control)
        y1 = jax.tree.map(lambda y, k: y + k, y0, k)
        info = {"y0": y0, "y1": y1}
        return pdx.step_maps.StepOutput(y1, jax.tree.map(jnp.zeros_like, y0), info, dfx.RESULTS.successful)


@eqx.filter_jit
def solve(solver, dt0=T1):
    saveat = dfx.SaveAt(ts=jnp.linspace(0.0, T1, 9), solver_state=isinstance(solver, pdx.ParallelSolver))
    return dfx.diffeqsolve(DRIVEN, solver, 0.0, T1, dt0, DRIVEN_Y0, DRIVEN_ARGS, saveat=saveat, max_steps=NUM_STEPS + 1)


@functools.cache
def sequential():
    return solve(dfx.Midpoint(), T1 / NUM_STEPS).ys


NEWTON = pdx.ParallelNewton
PARTS = {
    "a Jacobian": {"root_finder": NEWTON(jacobian=LowerTriangular()), "root_find_max_steps": 100},
    "a scan": {"root_finder": NEWTON(scan=Doubling())},
    "a root finder": {"root_finder": Halved(), "root_find_max_steps": 100},
    "a policy": {"policy": FirstHalf()},
    "a predictor": {"predictor": Straight()},
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_users_own_solves(part):
    options = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()} | PARTS[part]
    sol = solve(parallel_solver(dfx.Midpoint(), NUM_STEPS, **options))
    np.testing.assert_allclose(sol.ys, sequential(), rtol=1e-8, atol=1e-8)
    statistics = pdx.statistics(sol)
    parallel = NUM_STEPS // 2 if part == "a policy" else NUM_STEPS
    assert int(statistics.parallel_steps) == parallel
    assert int(statistics.sequential_steps) == NUM_STEPS - parallel
    # Half of every update halves the error, and so does no method of ours.
    assert int(statistics.iterations) > 20 or part != "a root finder"


def test_a_step_map_of_a_users_own_makes_the_steps():
    solver = parallel_solver(Midpoint(), NUM_STEPS, predictor=pdx.ConstantPredictor())
    TRACED.clear()
    sol = solve(solver)
    assert TRACED
    # Diffrax's own interpolates by a cubic, this one by straight lines: the same at the ends of steps.
    np.testing.assert_allclose(sol.ys, sequential(), rtol=1e-9, atol=1e-9)


@pytest.mark.full
def test_derivatives_pass_through_parts_of_a_users_own():
    def loss(args, solver, dt0):
        sol = dfx.diffeqsolve(DRIVEN, solver, 0.0, T1, dt0, DRIVEN_Y0, args, max_steps=NUM_STEPS + 1)
        return jnp.sum(sol.ys**2)

    options = PARTS["a Jacobian"] | PARTS["a policy"] | PARTS["a predictor"]
    options |= {"root_finder": NEWTON(jacobian=LowerTriangular(), scan=Doubling())}
    parallel = parallel_solver(Midpoint(), NUM_STEPS, **options)
    got = jax.jit(jax.grad(lambda args: loss(args, parallel, T1)))(DRIVEN_ARGS)
    want = jax.jit(jax.grad(lambda args: loss(args, dfx.Midpoint(), T1 / NUM_STEPS)))(DRIVEN_ARGS)
    np.testing.assert_allclose(got, want, rtol=1e-8)
