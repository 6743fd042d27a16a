"""What happens to the steps that a root finder could not solve."""

import abc

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int

from ._recurrence import Recurrence
from ._sequential import CHUNK, step_through


class AbstractFallback(eqx.Module):
    """A policy for the steps from the first one that parallel iteration did not solve."""

    @abc.abstractmethod
    def finish(
        self, recurrence: Recurrence, y: Float[Array, " N D"], start: Int[Array, ""]
    ) -> tuple[Float[Array, " N D"], Bool[Array, ""]]:
        """Completes a trajectory.

        **Arguments:**

        - `recurrence`: what to solve.
        - `y`: the states, right for all steps before `start`.
        - `start`: the first step that is not solved, `N` if all are.

        **Returns:** the states; and whether the steps from `start` on have been made.
        """


class SequentialFallback(AbstractFallback):
    """Makes the remaining steps one after the other, which is always right: the default.

    A `while` loop that starts at the first unsolved step: where all are solved, it runs zero times, also for the other
    members of a batch. Cost: `N - start` steps in sequence (rounded up to chunks of 128), no memory beyond the states.

    **Arguments:** none.
    """

    def finish(self, recurrence, y, start):
        num_steps = recurrence.length
        chunk = min(CHUNK, num_steps)

        def keep_going(carry):
            begin, _ = carry
            return begin < num_steps

        def body(carry):
            begin, y = carry
            # The last chunk begins early enough to be whole, and repeats some steps.
            begin = jnp.minimum(begin, num_steps - chunk)
            state = jnp.where(begin == 0, recurrence.init, y[jnp.maximum(begin - 1, 0)])
            xs = jtu.tree_map(lambda x: lax.dynamic_slice_in_dim(x, begin, chunk), recurrence.inputs)
            _, states = step_through(recurrence.step, state, xs, chunk)
            return begin + chunk, lax.dynamic_update_slice_in_dim(y, states, begin, axis=0)

        _, y = lax.while_loop(keep_going, body, (start, y))
        return y, jnp.array(True)


class NoFallback(AbstractFallback):
    """Leaves the remaining steps as they are: the solve then fails with the root finder's result.

    To be used where a step-size controller rejects the window anyway, or to see failures rather than wait for them.

    **Arguments:** none.
    """

    def finish(self, recurrence, y, start):
        return y, start >= recurrence.length
