"""Base solvers as step maps. `make_step_map` chooses one."""

import diffrax as dfx

from ..._recurrence import AbstractParallelRootFinder
from ._base import AbstractStepMap as AbstractStepMap, StepOutput as StepOutput
from ._diagonally_implicit import DiagonallyImplicitStep as DiagonallyImplicitStep
from ._explicit_runge_kutta import ExplicitRungeKuttaStep as ExplicitRungeKuttaStep
from ._generic import GenericStep as GenericStep


def make_step_map(solver: dfx.AbstractSolver, terms, y0, args, root_finder, time_dtype=None) -> AbstractStepMap:
    """The fastest step map that makes exactly the steps of `solver`.

    **Arguments:** the base solver; `terms`, `y0` and `args` as in `diffrax.diffeqsolve`; the root finder whose tolerances
    an implicit base solver takes over where it has none; the dtype of times, by default
    that of a Python float.

    **Raises:** `ValueError` for a solver whose step is not a map of the state alone.
    """
    if ExplicitRungeKuttaStep.supports(solver):
        return ExplicitRungeKuttaStep(solver, terms, args)
    # Other root finders know nothing of inner unknowns.
    if DiagonallyImplicitStep.supports(solver) and isinstance(root_finder, AbstractParallelRootFinder):
        return DiagonallyImplicitStep.make(solver, terms, y0, args, time_dtype)
    return GenericStep.make(solver, terms, y0, args, root_finder)
