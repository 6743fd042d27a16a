"""The coefficients `A` of a linear recurrence, one structure a file."""

from ._base import AbstractTransitions as AbstractTransitions
from ._block_diagonal import BlockDiagonalTransitions as BlockDiagonalTransitions
from ._dense import DenseTransitions as DenseTransitions, matrix_matrix as matrix_matrix
from ._diagonal import DiagonalTransitions as DiagonalTransitions
from ._scalar import ScalarTransitions as ScalarTransitions
from ._zero import ZeroTransitions as ZeroTransitions
