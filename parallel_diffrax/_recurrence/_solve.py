"""One solve of a recurrence: iterate, check, finish, differentiate."""

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from .._scan import AutoScan
from ._fallback import AbstractFallback
from ._implicit import stop_gradient, with_implicit_derivative
from ._jacobian import Dense
from ._recurrence import Recurrence
from ._tolerance import first_failure, Tolerance


class RecurrenceSolution(eqx.Module):
    """What became of a recurrence.

    **Attributes:**

    - `y`: the states, shape `(N, D)`; differentiable in everything that the recurrence depends on.
    - `healthy`: the steps with a finite outcome, shape `(N,)`.
    - `result`: `successful` only if every step's equation holds to tolerance, or the step was made sequentially, and
        every state is finite.
    - `iterations`: of the root finder.
    - `parallel_steps`: the number of leading steps that the root finder solved; the others, `N - parallel_steps`, were
        left to the fallback.
    - `residual`: the largest defect `|F(y[i-1]) - y[i]|` of the parallel steps, relative to the size that the component
        has had so far.
    """

    y: Float[Array, " N D"]
    healthy: Bool[Array, " N"]
    result: optx.RESULTS
    iterations: Int[Array, ""]
    parallel_steps: Int[Array, ""]
    residual: Float[Array, ""]


def _residual(y, recurrence):
    return recurrence.residual(y)


def solve_recurrence(
    recurrence: Recurrence,
    guess: Float[Array, " N D"],
    *,
    root_finder: optx.AbstractRootFinder,
    max_steps: int,
    fallback: AbstractFallback,
    eps: float,
) -> RecurrenceSolution:
    """Solves `y[i] = F(y[i-1], x[i])` for all `i` at once.

    **Arguments:**

    - `recurrence`: the steps.
    - `guess`: the first iterate, shape `(N, D)`. Entries that are not finite are replaced by the initial state.
    - `root_finder`: any Optimistix root finder that can solve the stacked residual.
    - `max_steps`: the largest number of iterations.
    - `fallback`: what to do with the steps that were not solved by then.
    - `eps`: the machine epsilon of the states' own dtype.

    **Returns:** a `RecurrenceSolution`. Nothing is raised.

    Cost: the iterations; one evaluation of all steps for the check; what the fallback does.
    """
    frozen = stop_gradient(recurrence)
    guess = stop_gradient(guess)
    guess = jnp.where(jnp.all(jnp.isfinite(guess), axis=1, keepdims=True), guess, frozen.init)
    found = optx.root_find(
        _residual,
        root_finder,
        guess,
        args=frozen,
        options={"resolution": eps},
        max_steps=max_steps,
        throw=False,
    )

    # What the root finder believes is checked against the equations themselves.
    tolerance = Tolerance(root_finder.rtol, root_finder.atol, root_finder.norm, eps)
    scale = tolerance.scale(found.value)
    defect = frozen.residual(found.value)
    holds = tolerance.holds(defect, scale, found.stats.get("rounding_size", scale))
    claimed = jnp.where(
        found.result == optx.RESULTS.successful, recurrence.length, found.stats.get("converged_steps", 0)
    )
    parallel_steps = jnp.minimum(first_failure(holds), claimed)
    solved = jnp.arange(recurrence.length) < parallel_steps

    y, finished = fallback.finish(frozen, found.value, parallel_steps)

    finite = jnp.all(jnp.isfinite(y), axis=1)
    healthy = finite & jnp.where(finished, True, jnp.all(jnp.isfinite(defect), axis=1))
    failure = optx.RESULTS.where(
        found.result == optx.RESULTS.successful, optx.RESULTS.nonlinear_divergence, found.result
    )
    result = optx.RESULTS.where(finished, optx.RESULTS.successful, failure)
    result = optx.RESULTS.where(jnp.all(finite), result, optx.RESULTS.nonfinite)

    # The derivative is evaluated as the root finder's own linear systems are.
    jacobian, scan = getattr(root_finder, "jacobian", Dense()), getattr(root_finder, "scan", AutoScan())
    relative = jnp.where(defect == 0, 0, jnp.abs(defect) / jnp.where(scale > 0, scale, 1))
    return RecurrenceSolution(
        y=with_implicit_derivative(recurrence, y, healthy, jacobian, scan),
        healthy=healthy,
        result=result,
        iterations=found.stats["num_steps"],
        parallel_steps=parallel_steps,
        residual=jnp.max(jnp.where(solved[:, None], relative, 0)),
    )
