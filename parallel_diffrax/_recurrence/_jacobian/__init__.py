"""Approximations of the Jacobians `A[i]` of a recurrence: one file each, named after what they build."""

from ._base import AbstractJacobian as AbstractJacobian
from ._dense import Dense as Dense
