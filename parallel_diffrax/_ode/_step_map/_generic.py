"""Any other one-step solver, through its own `init` and `step`."""

import diffrax as dfx
import equinox as eqx
import optimistix as optx
from jaxtyping import PyTree

from .._compat import unset_tolerances
from .._gaussian_elimination import GaussianElimination
from ._base import AbstractStepMap, StepOutput


class GenericStep(AbstractStepMap):
    """A step of any one-step Diffrax solver, as returned by `prepare`: `init` afresh, then `step`.

    An implicit solver costs a nonlinear solve in every step of every iteration.
    """

    solver: dfx.AbstractSolver
    terms: PyTree[dfx.AbstractTerm]
    args: PyTree

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


def with_innermost(solver: dfx.AbstractSolver, inner: dfx.AbstractSolver) -> dfx.AbstractSolver:
    """`solver` with another solver inside all wrappers."""
    return inner if innermost(solver) is solver else eqx.tree_at(innermost, solver, inner)


def prepare(solver: dfx.AbstractSolver, root_finder) -> dfx.AbstractSolver:
    """`solver` with the options that it leaves unset chosen for steps in parallel: loops with forward-mode derivatives, and
    a root finder that iterates to convergence, without batched LAPACK calls, to the `rtol` of the parallel root finder."""
    inner = innermost(solver)
    if isinstance(inner, (dfx.AbstractRungeKutta, dfx.AbstractSRK)) and inner.scan_kind is None:
        # Diffrax's default is a custom VJP, which has no JVP.
        kind = "bounded" if isinstance(inner, dfx.AbstractRungeKutta) else "lax"
        inner = eqx.tree_at(lambda s: s.scan_kind, inner, kind, is_leaf=lambda x: x is None)
    if isinstance(inner, dfx.AbstractImplicitSolver) and unset_tolerances(inner.root_finder):
        # Diffrax's default gives up early and lets a controller shorten the step. A fine step cannot be shortened.
        newton = optx.Newton(root_finder.rtol, 1e-2 * root_finder.rtol, linear_solver=GaussianElimination())
        inner = eqx.tree_at(lambda s: s.root_finder, inner, newton)
    return with_innermost(solver, inner)
