"""Base solvers as step maps. `make_step_map` chooses one."""

import diffrax as dfx

from ..._recurrence import AbstractParallelRootFinder
from ._base import (
    AbstractEmbeddedSolver as AbstractEmbeddedSolver,
    AbstractStepMap as AbstractStepMap,
    StepOutput as StepOutput,
)
from ._diagonally_implicit import DiagonallyImplicitStep as DiagonallyImplicitStep
from ._explicit_runge_kutta import ExplicitRungeKuttaStep as ExplicitRungeKuttaStep
from ._generic import GenericStep as GenericStep
from ._multiple_shooting import MultipleShooting as MultipleShooting, ShootingStep as ShootingStep
from ._random_keys import check_random_keys
from ._stateful import StatefulStep as StatefulStep


def make_step_map(solver: dfx.AbstractSolver, terms, y0, args, root_finder, time_dtype=None) -> AbstractStepMap:
    """The fastest step map that makes exactly the steps of `solver`.

    **Arguments:** the base solver; `terms`, `y0` and `args` as in `diffrax.diffeqsolve`; the root finder whose tolerances
    an implicit base solver takes over where it has none; the dtype of times, by default
    that of a Python float.

    **Raises:** `ValueError` for a solver that carries from step to step what is not a floating-point number, and for random
    keys whose numbers are others in a batch.
    """
    check_random_keys(terms, args)
    if ExplicitRungeKuttaStep.supports(solver):
        return ExplicitRungeKuttaStep(solver, terms, args)
    if type(solver) is MultipleShooting:
        return ShootingStep(solver, terms, args)
    # Other root finders know nothing of inner unknowns.
    if DiagonallyImplicitStep.supports(solver) and isinstance(root_finder, AbstractParallelRootFinder):
        return DiagonallyImplicitStep.make(solver, terms, y0, args, time_dtype)
    if StatefulStep.supports(solver, terms, y0, args):
        return StatefulStep.make(solver, terms, y0, args, root_finder)
    return GenericStep.make(solver, terms, args, root_finder)
