"""One step after the other, under a step-size controller that may reject each."""

import abc
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import unset_tolerances
from ._base import AbstractStepMap
from ._explicit_runge_kutta import ExplicitRungeKuttaStep, StepWithStages
from ._generic import innermost, with_innermost


class AbstractTrial(eqx.Module):
    """Steps that are made in sequence and may be rejected. What one step hands to the next, beside the state of the
    recurrence, is a `cache`: without it the numbers are the same, up to rounding or the tolerance of a root finder."""

    step_map: eqx.AbstractVar[AbstractStepMap]

    @abc.abstractmethod
    def cache(self, t0, t1, y0: PyTree) -> PyTree:
        """The cache before the first step, which goes from `t0` to `t1`."""

    @abc.abstractmethod
    def step(self, t0, t1, y0: PyTree, cache: PyTree, made_jump) -> tuple[PyTree, PyTree, PyTree, dfx.RESULTS]:
        """The state after a step, its error estimate, the cache, the result. `made_jump`: the field jumps at `t0`."""


class _FreshTrial(AbstractTrial):
    """Every step afresh."""

    step_map: AbstractStepMap

    def cache(self, t0, t1, y0):
        del t0, t1, y0

    def step(self, t0, t1, y0, cache, made_jump):
        del cache, made_jump
        output = self.step_map(t0, t1, y0)
        return output.y1, output.y_error, None, output.result


class _ExplicitTrial(AbstractTrial):
    """The last stage of a step is the first of the next one."""

    step_map: ExplicitRungeKuttaStep | StepWithStages

    def cache(self, t0, t1, y0):
        del t1
        return self.step_map.slope(t0, y0)

    def step(self, t0, t1, y0, cache, made_jump):
        if made_jump is not False:
            afresh = self.step_map.slope(t0, y0)
            cache = jtu.tree_map(lambda new, old: jnp.where(made_jump, new, old), afresh, cache)
        y1, y_error, slope = self.step_map.step_from(t0, t1, y0, cache)
        return y1, y_error, slope, dfx.RESULTS.successful


class _DiffraxTrial(AbstractTrial):
    """The steps of Diffrax itself, with the solver's own root finder and state."""

    step_map: AbstractStepMap
    solver: dfx.AbstractSolver

    def cache(self, t0, t1, y0):
        return self.solver.init(self.step_map.terms, t0, t1, y0, self._args)

    def step(self, t0, t1, y0, cache, made_jump):
        step = self.step_map.terms, t0, t1, y0, self._args, cache, made_jump
        y1, y_error, _, cache, result = self.solver.step(*step)
        return y1, y_error, cache, result

    @property
    def _args(self) -> Any:
        return self.step_map.args  # pyright: ignore[reportAttributeAccessIssue]


def make_trial(step_map: AbstractStepMap, solver: dfx.AbstractSolver, controller) -> AbstractTrial:
    """The fastest way to make the steps of a Diffrax `solver` in sequence. `step_map` are the same steps, as functions that
    are differentiated. A root finder without tolerances takes them from the `controller`, as in Diffrax."""
    if isinstance(step_map, (ExplicitRungeKuttaStep, StepWithStages)):
        reuses = step_map.smooth and step_map.first_same_as_last
        return _ExplicitTrial(step_map) if reuses else _FreshTrial(step_map)
    if step_map.has_solver_state or hasattr(type(solver), "step_map") or not hasattr(step_map, "args"):
        return _FreshTrial(step_map)
    return _DiffraxTrial(step_map, _with_tolerances(solver, controller))


def _with_tolerances(solver: dfx.AbstractSolver, controller) -> dfx.AbstractSolver:
    inner: Any = innermost(solver)
    names = unset_tolerances(getattr(inner, "root_finder", None))
    if len(names) == 0:
        return solver
    where = lambda s: [getattr(s.root_finder, name) for name in names]
    return with_innermost(solver, eqx.tree_at(where, inner, [getattr(controller, name) for name in names]))
