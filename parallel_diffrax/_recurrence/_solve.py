"""One solve of a recurrence: by what policy allows, then the derivative."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from ._driver import Counts, RecurrenceDriver
from ._implicit_derivative import stop_gradient, with_implicit_derivative
from ._jacobian import Dense
from ._policy import AbstractPolicy
from ._recurrence import Recurrence


# The name of what `keep_in_checkpoint` names, for `jax.checkpoint_policies.save_only_these_names`.
SOLUTION = "parallel_diffrax.solution"


def keep_in_checkpoint(tree: PyTree) -> PyTree:
    """The arrays of `tree` under a name by which `jax.checkpoint` can keep them: for what takes iterations to find, and for
    decisions, neither of which a backward pass that computes all else again may make a second time."""
    return jtu.tree_map(lambda x: checkpoint_name(x, SOLUTION) if eqx.is_array(x) else x, tree)


class RecurrenceSolution(eqx.Module):
    """What became of a recurrence.

    **Attributes:**

    - `y`: the states, shape `(N, D)`; differentiable in everything that the recurrence depends on.
    - `healthy`: the steps with a finite outcome, shape `(N,)`.
    - `finished`: whether every step has been solved or made, be its outcome finite or not.
    - `result`: `successful` only if every step's equation holds to tolerance, or the step was made sequentially, and
        every state is finite.
    - `counts`: the work; steps that were not solved in parallel were left to the policy.
    """

    y: Float[Array, " N D"]
    finite: Bool[Array, " N"]
    finished: Bool[Array, ""]
    result: optx.RESULTS
    counts: Counts


def solve_recurrence(
    recurrence: Recurrence,
    predict: Callable,
    *,
    root_finder: optx.AbstractRootFinder,
    max_steps: int,
    policy: AbstractPolicy,
    eps: float,
    step_size: Float[ArrayLike, ""] = 1.0,
    meter: Any = None,
) -> RecurrenceSolution:
    """Solves `y[i] = F(y[i-1], x[i])` for all `i` at once.

    **Arguments:**

    - `recurrence`: the steps.
    - `predict`: makes first guesses, without tangents; see `RecurrenceDriver`. Entries that are not finite are replaced by the
        state before them.
    - `root_finder`: any Optimistix root finder that can solve the stacked residual.
    - `max_steps`: the largest number of iterations of an attempt.
    - `fallback`: the policy: what is attempted, and what happens to the steps that were not solved.
    - `eps`: the machine epsilon of the states' own dtype.
    - `step_size`: how long a step is, in units of time.
    - `meter`: shows how far the policy has come; see `RecurrenceDriver`.

    **Returns:** a `RecurrenceSolution`. Nothing is raised.

    Cost: what the policy does.
    """
    driver = RecurrenceDriver(stop_gradient(recurrence), predict, root_finder, max_steps, eps, step_size, meter)
    outcome = keep_in_checkpoint(policy.complete(driver))
    finite_states = jnp.all(jnp.isfinite(outcome.y), axis=1)
    finite = finite_states & outcome.evaluated
    result = optx.RESULTS.where(outcome.finished, optx.RESULTS.successful, outcome.failure)
    result = optx.RESULTS.where(jnp.all(finite_states), result, optx.RESULTS.nonfinite)

    # The derivative is evaluated as the root finder's own linear systems are.
    jacobian = getattr(root_finder, "jacobian", Dense())
    y = with_implicit_derivative(recurrence, outcome.y, finite, jacobian, driver.scan)
    return RecurrenceSolution(y, finite, outcome.finished, result, outcome.counts)
