"""One step of a Diffrax solver as a function that can be vmapped and differentiated forwards.

`ParallelSolver` makes the step map of its base solver by itself. A solver of your own can bring one: subclass
`AbstractStepMap` and give the solver a method `step_map(terms, y0, args)` that returns it.
"""

from ._ode import (
    AbstractEmbeddedSolver as AbstractEmbeddedSolver,
    AbstractStepMap as AbstractStepMap,
    MultipleShooting as MultipleShooting,
    StepOutput as StepOutput,
)
