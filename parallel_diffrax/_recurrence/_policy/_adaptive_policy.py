"""Parallel where it pays, in segments as long as the dynamics allow, and sequential where it does not."""

import math

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..._scan import check_integer
from .._driver import Counts, RecurrenceDriver
from ._base import AbstractPolicy, Outcome


# Longer sequences are attempted as a whole first, and then in segments of at most so many steps. On a GPU an iteration on
# fewer steps takes no less time.
_LARGEST_SEGMENT = 16384
# Of larger states, segments are shorter: so many numbers may be in their Jacobians.
_LARGEST_JACOBIANS = 2**24
# After an attempt that did not pay, so many times as many steps are made in sequence as after the one before.
_BACKOFF = 16


class _Front(eqx.Module):
    """How far the solution has come: `y` is right before step `position`; `limit`, how many steps to attempt next; `run`,
    how many to make in sequence if that does not pay; `start_level`, what the predictor learned; `meter`, what shows it."""

    y: Float[Array, " M D"]
    position: Int[Array, ""]
    limit: Int[Array, ""]
    run: Int[Array, ""]
    start_level: Int[Array, ""]
    counts: Counts
    meter: PyTree


class AdaptivePolicy(AbstractPolicy):
    """Solves in parallel what can be, in segments as long as the dynamics allow, and makes the rest in sequence: the
    default of `ParallelSolver`.

    Perturbations of a trajectory grow like `exp(exponent * time)`. From a guess whose error is `e`, Newton's method
    converges over a time of about `log(1 / e) / exponent`, a number of Lyapunov times, and not beyond. So:

    1. The whole sequence is attempted. Newton's method is watched: it goes on with the leading steps on which its updates
        fall, so that a sequence it can solve as a whole is, and of any other it solves a beginning.
    2. From the last step that was solved the next segment is attempted with a new guess, about as long as the last one
        turned out to be, twice as long if all of it was solved; and so on to the end.
    3. An attempt that solves fewer than `min_steps` steps did not pay: a run of steps is made in sequence, sixteen times as
        many as after the attempt before if that did not pay either.

    The answer is right in any case: every segment's equations are checked, and steps in sequence are exact.

    **Arguments:**

    - `max_exponent`: the largest Lyapunov exponent, per unit of time, with which anything is solved in parallel: an attempt
        on steps over which perturbations grow faster is given up after one iteration, and all that remains is made in
        sequence. The default, infinity, leaves it to progress. `0.0` is the strict rule of the theory, under which an
        oscillator whose finite-time exponent is slightly positive is sequential too; `-math.inf` makes every step in
        sequence and attempts nothing.
    - `min_steps`: the number of steps that an attempt must solve to pay, at least 1. An iteration on a GPU takes as long as
        50 to 100 steps in sequence, and an attempt is a handful of them.

    **Raises:** `ValueError` for arguments out of range; for a finite `max_exponent` with a root finder whose
    Jacobians are approximate, since their products say nothing about growth.

    Cost: where the whole can be solved, the estimate of the growth: `N` products of matrices, once. In segments, every step
    is in about two attempts, each a guess and a handful of iterations. What is spent on attempts that do not pay falls with
    the logarithm of `N`. Memory: the states twice, and the Jacobians of a segment.

    ??? cite "References"

        Gonzalez, Kozachkov, Zoltowski, Clarkson, Linderman, "Predictability enables parallelization of nonlinear state
        space models", arXiv 2508.16817 (2025).

        Gonzalez, "Parallel Newton methods", arXiv 2603.16850 (2026).
    """

    max_exponent: float = eqx.field(static=True, default=math.inf)
    min_steps: int = eqx.field(static=True, default=128)

    def __check_init__(self):
        if not isinstance(self.max_exponent, (int, float)) or math.isnan(self.max_exponent):
            raise ValueError(
                f"`AdaptivePolicy(max_exponent={self.max_exponent!r})`: expected a Python number, or `math.inf`."
            )
        check_integer(
            "AdaptivePolicy", "min_steps", self.min_steps, "the number of steps that an attempt must solve to pay"
        )

    def splits_windows(self, num_steps):
        return self.max_exponent == -math.inf or num_steps >= 2 * self.min_steps

    def complete(self, driver):
        num_steps = driver.length
        counts = Counts.none(driver.init.dtype)
        if self.max_exponent == -math.inf:
            y, _, meter = driver.in_sequence(driver.buffer(), 0, num_steps, driver.start_meter())
            driver.stop_meter(meter)
            return Outcome.all(y[:num_steps], counts)
        self._check(driver)

        capacity = min(num_steps, _LARGEST_SEGMENT, max(1024, _LARGEST_JACOBIANS // driver.init.size**2))
        zero, first_run = jnp.array(0), jnp.array(self._first_run())
        front = _Front(
            driver.buffer(capacity=capacity), zero, jnp.array(num_steps), first_run, zero, counts, driver.start_meter()
        )
        if capacity < num_steps:
            front, stop = self._attempt(driver, front, num_steps, capacity)
            if self.max_exponent != math.inf:
                front = self._in_sequence(driver, front, stop)
            front = eqx.tree_at(lambda front: front.run, front, first_run)

        def advance(front):
            return self._in_sequence(driver, *self._attempt(driver, front, capacity, capacity))

        front = lax.while_loop(lambda front: front.position < num_steps, advance, front)
        driver.stop_meter(front.meter)
        return Outcome.all(front.y[:num_steps], front.counts)

    def _first_run(self) -> int:
        return 2 * self.min_steps

    def _check(self, driver: RecurrenceDriver):
        exact = getattr(driver.root_finder, "exact", False)
        if not exact and self.max_exponent != math.inf:
            raise ValueError(
                f"`AdaptivePolicy(max_exponent={self.max_exponent!r})` with `{driver.root_finder!r}`: growth is estimated "
                "from the exact Jacobians of Newton's method. Use `ParallelNewton()` with `jacobian=Dense()`, or leave "
                "`max_exponent` at infinity."
            )

    def _attempt(
        self, driver: RecurrenceDriver, front: _Front, room: int, capacity: int
    ) -> tuple[_Front, Int[Array, ""]]:
        """One attempt from the front, on at most `room` steps; the next will be on at most `capacity`.

        **Returns:** the front after it, and the step up to which to go in sequence now.
        """
        num_steps = driver.length
        # The first attempt on a sequence that is longer than that is on all of it.
        whole = room > capacity
        position = 0 if whole else front.position
        count = room if whole else jnp.minimum(front.limit, num_steps - front.position)
        state = driver.state_before(front.y, front.position)
        max_growth = None
        if self.max_exponent != math.inf:
            max_growth = jnp.asarray(self.max_exponent * jnp.abs(driver.step_size) * count, state.dtype)
        attempt = driver.solve_in_parallel(
            position, state, count, room, front.start_level, watch=True, max_growth=max_growth
        )

        reached = front.position + attempt.solved
        paid = (attempt.solved >= self.min_steps) | (reached >= num_steps)
        stop = jnp.where(attempt.growth_exceeded, num_steps, jnp.where(paid, reached, reached + front.run))
        longer = jnp.where(attempt.solved >= count, 2 * attempt.solved, attempt.solved + attempt.solved // 2)
        front = _Front(
            y=driver.buffer(attempt.y, capacity) if whole else driver.scan.write(front.y, attempt.y, front.position),
            position=reached,
            limit=jnp.clip(longer, min(4 * self.min_steps, capacity), capacity),
            run=jnp.where(paid, self._first_run(), _BACKOFF * front.run),
            # Another capacity has another meaning of it.
            start_level=jnp.array(0) if whole else attempt.start_level,
            counts=front.counts.add(attempt.counts),
            meter=front.meter,
        )
        return front, stop

    def _in_sequence(self, driver: RecurrenceDriver, front: _Front, stop: Int[Array, ""]) -> _Front:
        meter = driver.show(front.meter, front.position)
        y, position, meter = driver.in_sequence(front.y, front.position, stop, meter)
        return _Front(y, position, front.limit, front.run, front.start_level, front.counts, meter)
