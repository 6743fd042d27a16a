"""Moved to `_interpolation.py`."""

from ._interpolation import AbstractFineStepSolver as AbstractFineStepSolver
