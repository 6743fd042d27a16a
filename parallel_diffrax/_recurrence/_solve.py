"""The solve of a recurrence under a policy, with the derivative of its solution."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Float, Int

from .._kernels import has_forward_mode, on_cpu
from .._scan import check_instance, check_integer, row_at
from ._driver import RecurrenceDriver
from ._implicit_derivative import with_implicit_derivative, with_reverse_derivative
from ._jacobians import Dense
from ._policies import AbstractPolicy, ParallelOnly, Sequential
from ._recurrence import Recurrence
from ._sequential_derivative import LastState, with_sequential_derivative
from ._solution import RecurrenceSolution
from ._tangents import nan_derivative_unless, stop_gradient
from ._tolerance import num_leading_true


_Tree = TypeVar("_Tree")

# The name for `jax.checkpoint_policies.save_only_these_names`: see `keep_in_checkpoint`.
SOLUTION = "parallel_diffrax.solution"


def keep_in_checkpoint(tree: _Tree) -> _Tree:
    """Names the arrays of `tree`, so that `jax.checkpoint` can keep them. It is for solutions, which take iterations to
    find, and for decisions: a backward pass that recomputes everything else must not repeat either."""
    return jtu.tree_map(lambda x: checkpoint_name(x, SOLUTION) if eqx.is_array(x) else x, tree)


def check_kinds(name: str, root_finder, policy, max_steps):
    """Checks the arguments of `solve_recurrence` that a user of the function `name` gives."""
    check_instance(name, "root_finder", root_finder, optx.AbstractRootFinder, "ParallelNewton()")
    check_instance(name, "policy", policy, AbstractPolicy, "ParallelThenSequential()")
    check_integer(name, "max_steps", max_steps, "the largest number of iterations")


def solve_recurrence(
    recurrence: Recurrence,
    predict: Callable,
    root_finder: optx.AbstractRootFinder,
    max_steps: int,
    policy: AbstractPolicy,
    eps: float,
    step_size: Float[ArrayLike, ""] = 1.0,
    count: Int[ArrayLike, ""] | None = None,
    meter: Any = None,
) -> RecurrenceSolution:
    """Solves `y[i] = F(y[i-1], x[i])` for all `i`. No failure raises. The arguments are those of `RecurrenceDriver`, with a
    `predict` without tangents; for the derivative see `with_implicit_derivative`.

    Steps without derivatives in forward mode are made sequentially, unless the root finder needs none."""
    driver = RecurrenceDriver(
        stop_gradient(recurrence), predict, root_finder, max_steps, eps, step_size, count, meter, policy.kernels
    )
    # The linear systems of the derivative are solved like those of the root finder.
    jacobian = getattr(root_finder, "jacobian", Dense())
    forward_mode = has_forward_mode(recurrence.step, recurrence.init, recurrence.first_input)
    if not forward_mode and jacobian.needs_products:
        policy = _sequential(policy)
    solution = keep_in_checkpoint(policy.solve(driver))
    finite_states = jnp.all(jnp.isfinite(solution.y), axis=1)
    finite = finite_states & solution.finite
    all_finite = jnp.all(finite_states) if solution.all_finite is None else solution.all_finite
    result = optx.RESULTS.where(all_finite, solution.result, optx.RESULTS.nonfinite)
    end = driver.end
    if forward_mode and solution.sequential and on_cpu(policy.kernels):
        # Reverse mode by one sweep over the steps. There is no device on which a scan over their Jacobians would pay.
        made = jnp.minimum(num_leading_true(finite), end)
        y, last = with_sequential_derivative(recurrence, solution.y, LastState(solution.y[-1], made), policy.kernels)
        y = _still_after(made, y, last.y)
        y = nan_derivative_unless(finite[:, None], y)
    else:
        made = finite if count is None else finite & (jnp.arange(recurrence.length) < end)
        if forward_mode:
            y = with_implicit_derivative(recurrence, solution.y, made, jacobian, driver.scan, policy.kernels)
        else:
            y = with_reverse_derivative(recurrence, solution.y, made)
        y = y if count is None else _still_after(end, y, row_at(y, jnp.maximum(end - 1, 0)))
    if not solution.sequential:
        # A policy may fail. Its states may be finite, but are not those of the equations.
        y = nan_derivative_unless(jnp.asarray(solution.finished), y)
    counts = dataclasses.replace(solution.counts, in_kernel=driver.steps_in_kernel(solution.y))
    return RecurrenceSolution(y, finite, solution.finished, result, counts, sequential=solution.sequential)


def _still_after(count: Int[ArrayLike, ""], y: Float[Array, " N D"], last: Float[Array, " D"]) -> Float[Array, " N D"]:
    """The states `y` of the first `count` steps, and `last`, the state after them, from there on."""
    return jnp.where((jnp.arange(y.shape[0]) < count)[:, None], y, last[None])


def _sequential(policy: AbstractPolicy) -> AbstractPolicy:
    if isinstance(policy, ParallelOnly):
        raise TypeError(
            "`ParallelOnly()`: the root finder needs derivatives of a step in forward mode, which a `jax.custom_vjp` or a "
            "callback in the step does not have. Give that function a `jax.custom_jvp` instead, or use `AdaptivePolicy()`, "
            "which then makes all steps sequentially."
        )
    return Sequential(policy.kernels)
