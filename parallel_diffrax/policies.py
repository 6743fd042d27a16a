"""Which steps run in parallel and which sequentially, in `ParallelSolver(policy=...)` and `parallel_scan(policy=...)`.

- `CostPolicy()`: sequentially or by `AdaptivePolicy()`, whichever is estimated to cost less. The default of
  `ParallelSolver`.
- `AdaptivePolicy()`: solves segments in parallel, as long as the dynamics allow.
- `Sequential()`: makes all steps sequentially.
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
    CostPolicy as CostPolicy,
    Counts as Counts,
    ParallelOnly as ParallelOnly,
    ParallelThenSequential as ParallelThenSequential,
    RecurrenceDriver as RecurrenceDriver,
    RecurrenceSolution as RecurrenceSolution,
    Segments as Segments,
    Sequential as Sequential,
)
