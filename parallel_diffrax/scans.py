"""Scans evaluate linear recurrences `d[i] = A[i] d[i-1] + r[i]` in `ParallelNewton(scan=...)` and `ELK(scan=...)`.

`AutoScan()`, the default, chooses a scan by platform and size. `ShardedScan(mesh)` spreads time over devices. To write
another, subclass `AbstractScan` and implement `prefix`, which computes all prefix products of an associative operation.

`BidiagonalSolver` solves the same recurrence as a `lineax` solver.
"""

from ._scan import (
    AbstractScan as AbstractScan,
    AssociativeScan as AssociativeScan,
    AutoScan as AutoScan,
    BidiagonalSolver as BidiagonalSolver,
    BlockedScan as BlockedScan,
    KernelScan as KernelScan,
    KoggeStoneScan as KoggeStoneScan,
    SequentialScan as SequentialScan,
    ShardedScan as ShardedScan,
)
