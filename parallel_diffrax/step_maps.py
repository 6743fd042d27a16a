"""One step of a Diffrax solver as a function that can be vmapped and differentiated in forward mode.

`ParallelSolver` makes the step map of its base solver. A solver of your own can bring its step map: subclass
`AbstractStepMap`, and give the solver the method

    def step_map(self, terms, y0, args) -> AbstractStepMap

with `terms`, `y0` and `args` as in `diffrax.AbstractSolver.init`. `ParallelSolver` asks the type of its base solver for this
method first; `MultipleShooting` is an example. It does not ask a solver inside a `diffrax.AbstractWrappedSolver`. A solver
without the method needs nothing: `ParallelSolver` chooses a step map by its type.
"""

from ._ode import (
    AbstractEmbeddedSolver as AbstractEmbeddedSolver,
    AbstractStepMap as AbstractStepMap,
    MultipleShooting as MultipleShooting,
    StepOutput as StepOutput,
)
