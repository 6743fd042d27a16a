"""Approximations of the Jacobians `A[i]` of the steps, in `ParallelNewton(jacobian=...)` and `ELK(jacobian=...)`.

| `jacobian=` | method | work / memory per iteration |
|---|---|---|
| `Dense()` | Newton (DEER) | `N D^3` / `N D^2` |
| `BlockDiagonal(groups)` | quasi-Newton, blocks of size `b` | `N D b^2` / `N D b` |
| `Diagonal()` | quasi-Newton (quasi-DEER) | `N D` / `N D` |
| `Hutchinson(num_probes, key)` | quasi-Newton, estimated diagonal | `N D` / `N D` |
| `Identity()` | Picard | `N D` / `N D` |
| `Zero()` | Jacobi | `N D` / `N D` |
| `Scaled(k, base)`, `Clipped(base, limit)` | a damped version of `base` | as `base` |

To write another, subclass `AbstractJacobian` and implement `linearise`, which returns the matrices as one of the
`...Transitions` below.
"""

from ._recurrence import (
    AbstractJacobian as AbstractJacobian,
    BlockDiagonal as BlockDiagonal,
    Clipped as Clipped,
    Dense as Dense,
    Diagonal as Diagonal,
    Hutchinson as Hutchinson,
    Identity as Identity,
    Scaled as Scaled,
    Zero as Zero,
)
from ._scan import (
    AbstractTransitions as AbstractTransitions,
    BlockDiagonalTransitions as BlockDiagonalTransitions,
    DenseTransitions as DenseTransitions,
    DiagonalTransitions as DiagonalTransitions,
    ScalarTransitions as ScalarTransitions,
    ZeroTransitions as ZeroTransitions,
)
