"""Which steps run in parallel and which sequentially, in `ParallelSolver(policy=...)` and `parallel_scan(policy=...)`.

- `AdaptivePolicy()`: solves segments in parallel, as long as the dynamics allow. The default of `ParallelSolver`.
- `ParallelThenSequential()`: solves all steps in parallel, then makes the unsolved ones sequentially. The default of
  `parallel_scan`.
- `ParallelOnly()`: solves all steps in parallel, or fails.

To write another, subclass `AbstractPolicy`. Its `solve` is given a `RecurrenceDriver`, whose `solve_in_parallel` returns an
`Attempt` and whose `step_sequentially` returns the states. It returns a `RecurrenceSolution` with the `Counts` of the
attempts.
"""

from ._recurrence import (
    AbstractPolicy as AbstractPolicy,
    AdaptivePolicy as AdaptivePolicy,
    Attempt as Attempt,
    Counts as Counts,
    ParallelOnly as ParallelOnly,
    ParallelThenSequential as ParallelThenSequential,
    RecurrenceDriver as RecurrenceDriver,
    RecurrenceSolution as RecurrenceSolution,
)
