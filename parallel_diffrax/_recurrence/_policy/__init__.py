"""Policies: which steps are solved in parallel and which are made in sequence. One file each."""

from ._adaptive_policy import AdaptivePolicy as AdaptivePolicy
from ._base import AbstractPolicy as AbstractPolicy, Outcome as Outcome
from ._parallel_only import ParallelOnly as ParallelOnly
from ._parallel_then_sequential import ParallelThenSequential as ParallelThenSequential
