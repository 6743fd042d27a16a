"""Which steps are solved in parallel and which sequentially, in `ParallelSolver(policy=...)` and `parallel_scan(policy=...)`.

- `AdaptivePolicy()`: in segments as long as the dynamics allow. The default of `ParallelSolver`.
- `ParallelThenSequential()`: all steps in parallel, and those that were not solved sequentially. The default of `parallel_scan`.
- `ParallelOnly()`: all steps in parallel; fails if they were not all solved.

To write another, subclass `AbstractPolicy`. Its `solve` is given a `RecurrenceDriver`, and returns a `RecurrenceSolution`.
"""

from ._recurrence import (
    AbstractPolicy as AbstractPolicy,
    AdaptivePolicy as AdaptivePolicy,
    Attempt as Attempt,
    ParallelOnly as ParallelOnly,
    ParallelThenSequential as ParallelThenSequential,
    RecurrenceDriver as RecurrenceDriver,
    RecurrenceSolution as RecurrenceSolution,
)
