"""Base solvers as step maps. `make_step_map` chooses one."""

import diffrax as dfx

from ._base import AbstractStepMap as AbstractStepMap, StepOutput as StepOutput
from ._explicit_runge_kutta import ExplicitRungeKuttaStep as ExplicitRungeKuttaStep
from ._generic import GenericStep as GenericStep
from ._random_keys import check_random_keys
from ._stateful import StatefulStep as StatefulStep


def make_step_map(solver: dfx.AbstractSolver, terms, y0, args, root_finder) -> AbstractStepMap:
    """The fastest step map that makes exactly the steps of `solver`.

    **Arguments:** the base solver; `terms`, `y0` and `args` as in `diffrax.diffeqsolve`; the root finder whose tolerances
    an implicit base solver takes over where it has none.

    **Raises:** `ValueError` for a solver that carries from step to step what is not a floating-point number, and for random
    keys whose numbers are others in a batch.
    """
    check_random_keys(terms, args)
    if ExplicitRungeKuttaStep.supports(solver):
        return ExplicitRungeKuttaStep(solver, terms, args)
    if StatefulStep.supports(solver, terms, y0, args):
        return StatefulStep.make(solver, terms, y0, args, root_finder)
    return GenericStep.make(solver, terms, args, root_finder)
