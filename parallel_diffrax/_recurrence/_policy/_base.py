"""The interface of every policy."""

import abc

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float

from .._driver import Counts, RecurrenceDriver


class Outcome(eqx.Module):
    """**Attributes:** `y`, all states, shape `(N, D)`; `known`, the steps whose state is solved for, made or at least
    evaluated; `finished`, whether every step has been solved or made; `failure`, what to report if not; `counts`, the
    work done."""

    y: Float[Array, " N D"]
    evaluated: Bool[Array, " N"]
    finished: Bool[Array, ""]
    failure: optx.RESULTS
    counts: Counts

    @classmethod
    def all(cls, y: Float[Array, " N D"], counts: Counts) -> "Outcome":
        """Every step has been solved or made."""
        return cls(y, jnp.ones(y.shape[0], bool), jnp.array(True), optx.RESULTS.successful, counts)


class AbstractPolicy(eqx.Module):
    """A policy: how to bring all steps of a recurrence home with an engine that solves segments of it in parallel and
    makes steps in sequence."""

    def splits_windows(self, num_steps: int) -> bool:
        """Whether it cuts sequences of so many steps where the dynamics ask for it: otherwise, one that could not be solved
        in parallel should have been shorter."""
        del num_steps
        return False

    @abc.abstractmethod
    def complete(self, driver: RecurrenceDriver) -> Outcome:
        """All steps, or as many as the policy allows.

        **Arguments:** the engine, without tangents. It is traced once for each call of `RecurrenceDriver.in_parallel`, and that is
        most of the time to compile: make few of them.
        """
