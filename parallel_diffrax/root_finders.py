"""Iterations on all steps of a recurrence at once: what `ParallelNewton` and `ELK` are made of.

To write another, subclass `AbstractParallelRootFinder` and implement `iterate`: one update of all states, given the
linearised residual. Any other `optimistix.AbstractRootFinder` that can solve the stacked residual works as well.
"""

from ._recurrence import (
    AbstractParallelRootFinder as AbstractParallelRootFinder,
    ELK as ELK,
    ParallelNewton as ParallelNewton,
    safeguarded_update as safeguarded_update,
    Tolerance as Tolerance,
)
