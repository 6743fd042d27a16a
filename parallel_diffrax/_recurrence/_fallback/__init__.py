"""Policies: which steps are solved in parallel and which are made in sequence. One file each."""

from ._base import AbstractFallback as AbstractFallback, Outcome as Outcome
from ._lyapunov import LyapunovFallback as LyapunovFallback
from ._none import NoFallback as NoFallback
from ._sequential import SequentialFallback as SequentialFallback
