"""Any other one-step solver, through its own `init` and `step`."""

import diffrax as dfx
import equinox as eqx
import optimistix as optx
from jaxtyping import PyTree

from .._compat import is_unset_tolerance
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


def prepare(solver: dfx.AbstractSolver, root_finder) -> dfx.AbstractSolver:
    """`solver` with the options that it leaves unset chosen for steps in parallel: loops with forward-mode derivatives, and
    a root finder that iterates to convergence, without batched LAPACK calls, to the `rtol` of the parallel root finder."""
    if issubclass(type(solver), dfx.AbstractWrappedSolver):
        inner = prepare(solver.solver, root_finder)  # pyright: ignore[reportAttributeAccessIssue]
        return eqx.tree_at(lambda s: s.solver, solver, inner)
    if isinstance(solver, (dfx.AbstractRungeKutta, dfx.AbstractSRK)) and solver.scan_kind is None:
        # Diffrax's default is a custom VJP, which has no JVP.
        kind = "bounded" if isinstance(solver, dfx.AbstractRungeKutta) else "lax"
        solver = eqx.tree_at(lambda s: s.scan_kind, solver, kind, is_leaf=lambda x: x is None)
    if isinstance(solver, dfx.AbstractImplicitSolver) and any(
        is_unset_tolerance(getattr(solver.root_finder, name)) for name in ("rtol", "atol", "norm")
    ):
        # Diffrax's default gives up early and lets a controller shorten the step. A fine step cannot be shortened.
        newton = optx.Newton(root_finder.rtol, 1e-2 * root_finder.rtol, linear_solver=GaussianElimination())
        solver = eqx.tree_at(lambda s: s.root_finder, solver, newton)
    return solver
