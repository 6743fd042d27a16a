"""Base solvers as step maps. `make_step_map` chooses one.

- `_base.py`: the interface.
- `_explicit_runge_kutta.py`, `_diagonally_implicit.py`, `_multiple_shooting.py`, `_stateful.py`, `_generic.py`: one kind of
  base solver each.
- `_stage_equations.py`, `_simplified_newton.py`: the stages of diagonally implicit steps: exact, and for first guesses.
- `_random_keys.py`: refuses random keys that are unsafe in parallel.
"""

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
    """The fastest step map that makes exactly the steps of `solver`: its own, if it has a method `step_map`.

    **Arguments:**

    - `solver`: the base solver.
    - `terms`, `y0`, `args`: as in `diffrax.diffeqsolve`.
    - `root_finder`: the parallel root finder. An implicit base solver without tolerances takes them from it.
    - `time_dtype`: the dtype of times, by default that of a Python float.

    **Raises:** `ValueError` for a solver that carries anything but floating-point numbers from step to step, and for random
    keys whose numbers differ in a batch. `TypeError` if the solver's `step_map` returns anything but a step map.
    """
    check_random_keys(terms, args)
    if hasattr(type(solver), "step_map"):
        return _own_step_map(solver, terms, y0, args)
    if ExplicitRungeKuttaStep.supports(solver):
        return ExplicitRungeKuttaStep(solver, terms, args)
    # Other root finders do not know inner unknowns.
    if DiagonallyImplicitStep.supports(solver) and isinstance(root_finder, AbstractParallelRootFinder):
        return DiagonallyImplicitStep.make(solver, terms, y0, args, time_dtype)
    if StatefulStep.supports(solver, terms, y0, args):
        return StatefulStep.make(solver, terms, y0, args, root_finder)
    return GenericStep.make(solver, terms, args, root_finder)


def _own_step_map(solver, terms, y0, args) -> AbstractStepMap:
    step_map = solver.step_map(terms, y0, args)
    if not isinstance(step_map, AbstractStepMap):
        raise TypeError(
            f"`{type(solver).__name__}.step_map(terms, y0, args)`: expected an instance of `AbstractStepMap`, got "
            f"`{step_map!r}`. See `parallel_diffrax.step_maps`."
        )
    return step_map
