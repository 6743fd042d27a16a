"""Root finders: iterations on all steps of a recurrence at once.

- `ParallelNewton()`: Newton's method, or a quasi-Newton method with an approximation of `parallel_diffrax.jacobians`.
- `ELK()`: damped Newton iterations, for poor guesses.

To write another, subclass `AbstractParallelRootFinder` and implement `iterate`: one update of all states, given the
linearised residual. `safeguarded_update` applies the update of `ParallelNewton`. `Tolerance` tests whether an update is
small. Any other `optimistix.AbstractRootFinder` that solves the residual of all steps works as well.

A solve passes a `SolveRequest` in `options["request"]` of `optimistix.root_find`. A root finder of this package returns a
`SolveReport` in `stats["report"]` of the `optimistix.Solution`. Both are optional.
"""

from ._recurrence import (
    AbstractParallelRootFinder as AbstractParallelRootFinder,
    ELK as ELK,
    ParallelNewton as ParallelNewton,
    safeguarded_update as safeguarded_update,
    SolveReport as SolveReport,
    SolveRequest as SolveRequest,
    Tolerance as Tolerance,
)
