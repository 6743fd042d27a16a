"""Linear recurrences: pure algebra that knows no ODE and no Newton.

Notation, for `N` steps of a `D`-dimensional state:

    d[i] = A[i] d[i-1] + r[i],   d[-1] = 0,   i = 0 .. N-1          L d = r
    w[i] = A[i+1]^T w[i+1] + r[i],   w[N] = 0                       L^T w = r

`L` is block lower bidiagonal: identities on the diagonal, `-A[i]` below it. `A[0]` multiplies zero and is never read.

- `_transitions.py`: what `A` is (`DenseTransitions`, `DiagonalTransitions`, ...). A new structure of `A` is one new class.
- `_base.py`, `_sequential.py`, `_associative.py`: how the recurrence is evaluated. A new scan is one new file.
- `_bidiagonal.py`: `L` as a `lineax` operator with its solver, and as a function that can be differentiated.
"""

from ._associative import AssociativeScan as AssociativeScan
from ._base import AbstractScan as AbstractScan
from ._bidiagonal import (
    BidiagonalOperator as BidiagonalOperator,
    BidiagonalSolver as BidiagonalSolver,
    solve_bidiagonal as solve_bidiagonal,
)
from ._sequential import SequentialScan as SequentialScan
from ._transitions import (
    AbstractTransitions as AbstractTransitions,
    DenseTransitions as DenseTransitions,
    DiagonalTransitions as DiagonalTransitions,
)
