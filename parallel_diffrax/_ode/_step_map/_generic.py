"""Any other one-step solver, through its own `init` and `step`."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import PyTree

from .._compat import is_unset_tolerance
from .._gaussian_elimination import GaussianElimination
from ._base import AbstractStepMap, StepOutput


class GenericStep(AbstractStepMap):
    """A step of any one-step Diffrax solver: `init` afresh, then `step`.

    An implicit solver costs a nonlinear solve in every step of every iteration. If its root finder takes tolerances from a
    step-size controller, which is Diffrax's default, `optimistix.Newton` with the relative tolerance of the parallel root
    finder replaces it.

    **Arguments:** the base solver, made differentiable by `GenericStep.make`; `terms` and `args`.
    """

    solver: dfx.AbstractSolver
    terms: PyTree[dfx.AbstractTerm]
    args: PyTree

    @classmethod
    def make(cls, solver: dfx.AbstractSolver, terms, args, root_finder) -> "GenericStep":
        """The step map of `solver`, with options that it leaves unset chosen for steps in parallel: loops with forward-mode
        derivatives, and a root finder that iterates to convergence without batched LAPACK calls."""
        return cls(prepare(solver, root_finder), terms, args)

    def __call__(self, t0, t1, y0, y1=None):
        del y1
        state = self.solver.init(self.terms, t0, t1, y0, self.args)
        # A fresh `init` is right after a jump too, and Diffrax's `QUICSORT` does not accept `made_jump=True` (0.7.2).
        y1, y_error, dense_info, _, result = self.solver.step(self.terms, t0, t1, y0, self.args, state, made_jump=False)
        return StepOutput(y1, y_error, dense_info, result)


def innermost(solver: dfx.AbstractSolver) -> dfx.AbstractSolver:
    """The solver inside all wrappers (`diffrax.HalfSolver` is a wrapper)."""
    while issubclass(type(solver), dfx.AbstractWrappedSolver):
        solver = solver.solver  # pyright: ignore[reportAttributeAccessIssue]
    return solver


def state_structure(solver: dfx.AbstractSolver, terms, y0, args) -> PyTree[jax.ShapeDtypeStruct]:
    """The structure of the state that the solver carries from step to step."""
    t = jax.eval_shape(lambda: jnp.asarray(0.0))
    return eqx.filter_eval_shape(solver.init, terms, t, t, y0, args)


def prepare(solver: dfx.AbstractSolver, root_finder) -> dfx.AbstractSolver:
    """`solver` with loops that have forward-mode derivatives, and a root finder that needs no controller."""
    if issubclass(type(solver), dfx.AbstractWrappedSolver):
        inner = prepare(solver.solver, root_finder)  # pyright: ignore[reportAttributeAccessIssue]
        return eqx.tree_at(lambda s: s.solver, solver, inner)
    if isinstance(solver, (dfx.AbstractRungeKutta, dfx.AbstractSRK)) and solver.scan_kind is None:
        # Diffrax's default is a custom VJP, which has no JVP.
        kind = "bounded" if isinstance(solver, dfx.AbstractRungeKutta) else "lax"
        solver = eqx.tree_at(lambda s: s.scan_kind, solver, kind, is_leaf=lambda x: x is None)
    if isinstance(solver, dfx.AbstractImplicitSolver) and _has_unset_tolerances(solver.root_finder):
        # Diffrax's default gives up early and lets a controller shorten the step. A fine step cannot be shortened, so this
        # root finder iterates to convergence.
        rtol = root_finder.rtol
        newton = optx.Newton(rtol, 1e-2 * rtol, linear_solver=GaussianElimination())
        solver = eqx.tree_at(lambda s: s.root_finder, solver, newton)
    return solver


def _has_unset_tolerances(root_finder) -> bool:
    return any(is_unset_tolerance(getattr(root_finder, name)) for name in ("rtol", "atol", "norm"))
