"""Approximations of the Jacobians `A[i]` of a recurrence: one file each, named after what they build."""

from ._base import AbstractJacobian as AbstractJacobian
from ._block_diagonal import BlockDiagonal as BlockDiagonal
from ._clipped import Clipped as Clipped
from ._dense import Dense as Dense
from ._diagonal import Diagonal as Diagonal
from ._hutchinson import Hutchinson as Hutchinson
from ._identity import Identity as Identity
from ._scaled import Scaled as Scaled
from ._zero import Zero as Zero
