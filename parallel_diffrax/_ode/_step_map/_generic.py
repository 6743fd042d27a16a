"""Any other one-step solver, through its own `init` and `step`."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import PyTree

from .._compat import is_unset_tolerance
from .._elimination import GaussianElimination
from ._base import AbstractStepMap, StepOutput


# Solvers whose state only caches what `init` computes from the step's own arguments, so that calling `init` afresh for
# every step changes nothing. Any other state is part of the recurrence.
_STATELESS = (dfx.AbstractRungeKutta, dfx.AbstractSRK, dfx.AbstractFosterLangevinSRK)


class GenericStep(AbstractStepMap):
    """A step of any one-step Diffrax solver: `init` afresh, then `step`.

    Implicit solvers work, at the price of a nonlinear solve inside every step inside every iteration. Where the tolerances
    of their root finder are left to a step-size controller, as by default, it is replaced by `optimistix.Newton` with the
    relative tolerance of the parallel root finder.

    **Arguments:** the base solver, made differentiable by `GenericStep.make`; `terms` and `args`.
    """

    solver: dfx.AbstractSolver
    terms: PyTree[dfx.AbstractTerm]
    args: PyTree

    @classmethod
    def make(cls, solver: dfx.AbstractSolver, terms, y0, args, root_finder) -> "GenericStep":
        """The step map of `solver`, whose unset options are set to ones that work here: loops that can be differentiated
        forwards, and a root finder that iterates to the end without batched LAPACK calls."""
        _check_stateless(solver, terms, y0, args)
        return cls(_prepare(solver, root_finder), terms, args)

    def __call__(self, t0, t1, y0, y1=None):
        del y1
        state = self.solver.init(self.terms, t0, t1, y0, self.args)
        y1, y_error, dense_info, _, result = self.solver.step(self.terms, t0, t1, y0, self.args, state, made_jump=True)
        return StepOutput(y1, y_error, dense_info, result)


def _innermost(solver):
    while issubclass(type(solver), dfx.AbstractWrappedSolver):
        solver = solver.solver
    return solver


def _check_stateless(solver, terms, y0, args):
    base = _innermost(solver)
    if isinstance(base, _STATELESS):
        return
    t = jax.eval_shape(lambda: jax.numpy.asarray(0.0))
    state = eqx.filter_eval_shape(base.init, terms, t, t, y0, args)
    if len(jtu.tree_leaves(state)) > 0:
        raise ValueError(
            f"`ParallelSolver({type(solver).__name__}(), ...)`: a step of `{type(base).__name__}` depends on more than the "
            "state at its start (it is a multi-step or stateful method), so the steps of a window are not a recurrence "
            "of the state alone. Use a one-step method of the same order instead, for example `diffrax.Heun()` or "
            "`diffrax.Tsit5()`, or the solver by itself without `ParallelSolver`."
        )


def _prepare(solver, root_finder):
    if issubclass(type(solver), dfx.AbstractWrappedSolver):
        return eqx.tree_at(lambda s: s.solver, solver, _prepare(solver.solver, root_finder))
    if isinstance(solver, (dfx.AbstractRungeKutta, dfx.AbstractSRK)) and solver.scan_kind is None:
        # Diffrax's default is a custom vjp, of which there is no jvp.
        kind = "bounded" if isinstance(solver, dfx.AbstractRungeKutta) else "lax"
        solver = eqx.tree_at(lambda s: s.scan_kind, solver, kind, is_leaf=lambda x: x is None)
    if isinstance(solver, dfx.AbstractImplicitSolver) and _has_unset_tolerances(solver.root_finder):
        # Diffrax's default gives up early, for a controller to shorten the step. Here nothing can: iterate to the end.
        rtol = root_finder.rtol
        newton = optx.Newton(rtol, 1e-2 * rtol, linear_solver=GaussianElimination())
        solver = eqx.tree_at(lambda s: s.root_finder, solver, newton)
    return solver


def _has_unset_tolerances(root_finder) -> bool:
    return any(is_unset_tolerance(getattr(root_finder, name)) for name in ("rtol", "atol", "norm"))
