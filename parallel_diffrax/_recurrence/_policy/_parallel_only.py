"""No second chance."""

import jax.numpy as jnp
import optimistix as optx

from ._base import AbstractPolicy, Outcome


class ParallelOnly(AbstractPolicy):
    """Solves all steps in parallel or fails with the root finder's result.

    To be used where a step-size controller rejects the window anyway, or to see failures rather than wait for them.

    **Arguments:** none.
    """

    def complete(self, driver):
        num_steps = driver.length
        attempt = driver.solve_in_parallel(0, driver.init, num_steps, num_steps)
        solved = jnp.arange(num_steps) < attempt.solved
        # The root finder may have been content with what the equations are not.
        success = optx.RESULTS.successful
        failure = optx.RESULTS.where(attempt.result == success, optx.RESULTS.nonlinear_divergence, attempt.result)
        finished = attempt.solved >= num_steps
        return Outcome(attempt.y, solved | attempt.evaluated, finished, failure, attempt.counts)
