"""Policies: which steps run in parallel and which sequentially."""

import abc
import dataclasses
import math

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float, Int, PyTree

from .._kernels import by_batch_size, on_cpu, SETTINGS
from .._scan import check_integer
from ._cost import parallel_pays
from ._driver import RecurrenceDriver
from ._solution import Counts, RecurrenceSolution
from ._stepper import Stepper


class AbstractPolicy(eqx.Module):
    """Decides which steps of a recurrence run in parallel and which sequentially."""

    def __check_init__(self):
        if self.kernels not in SETTINGS:
            raise ValueError(
                f"`{type(self).__name__}(kernels={self.kernels!r})`: expected one of {', '.join(map(repr, SETTINGS))}."
            )

    def splits_windows(self, num_steps: int) -> bool:
        """Whether the policy divides a sequence of `num_steps` steps into segments if the dynamics require it. If not, a
        sequence that was not solved in parallel is too long, and a step-size controller may reject it."""
        del num_steps
        return False

    @property
    def kernels(self) -> str:
        """The backend of the kernels that make sequential steps, `off`, or `auto`."""
        return "auto"

    @property
    def follows_controller(self) -> bool:
        """Whether under an adaptive step-size controller, which chooses each step after the one before, steps are made
        sequentially. If not, each window has the same number of steps."""
        return False

    @abc.abstractmethod
    def solve(self, driver: RecurrenceDriver) -> RecurrenceSolution:
        """Solves or makes all steps, or as many as the policy allows, with a driver without tangents. `solve_recurrence`
        adds the derivative to the solution."""


class _AbstractFollower(AbstractPolicy):
    """A policy that lets an adaptive step-size controller choose each step, and accepts windows of any length."""

    @property
    def follows_controller(self):
        return True

    def splits_windows(self, num_steps):
        del num_steps
        return True


class Sequential(_AbstractFollower):
    """Makes all steps sequentially.

    Use it to rule out steps in parallel, as for a system that is known to be chaotic. (`CostPolicy`, the default, does the
    same on a CPU, in large batches and for few steps.) Under an adaptive step-size controller the steps are those that the
    controller chooses.

    **Arguments:** `kernels`, as in `AdaptivePolicy`.

    **Cost:** the steps; on a GPU in one kernel if the step is small, with one thread per member of a batch. No memory beyond
    the states.

    **Raises:** `ValueError` for an unknown `kernels`.
    """

    kernels: str = eqx.field(static=True, default="auto")

    def solve(self, driver):
        return self.solve_with(driver, driver.stepper())

    @staticmethod
    def solve_with(driver: RecurrenceDriver, stepper: Stepper) -> RecurrenceSolution:
        """The solution by the driver's own stepper, which takes time to build."""
        y, all_finite = driver.make_all_steps(stepper)
        return RecurrenceSolution.complete(y, Counts.none(driver.init.dtype), all_finite, sequential=True)


class ParallelOnly(AbstractPolicy):
    """Solves all steps in parallel, or fails with the result of the root finder.

    Use it if a step-size controller rejects a window that fails, or to see a failure instead of waiting for sequential
    steps.

    **Cost:** one attempt.
    """

    def solve(self, driver):
        num_steps = driver.length
        attempt = driver.solve_in_parallel(0, driver.init, driver.end, num_steps)
        solved = jnp.arange(num_steps) < attempt.num_solved
        # The root finder may report a success that the equations refute.
        success = optx.RESULTS.successful
        failure = optx.RESULTS.where(attempt.result == success, optx.RESULTS.nonlinear_divergence, attempt.result)
        finished = attempt.num_solved >= driver.end
        result = optx.RESULTS.where(finished, success, failure)
        y = driver.all_states(attempt.y)
        return RecurrenceSolution(y, solved | attempt.evaluated, finished, result, attempt.counts)


class ParallelThenSequential(AbstractPolicy):
    """Solves all steps in parallel, then makes those from the first unsolved one sequentially. The default of
    `parallel_scan`.

    Every step is correct in any case. A member of a batch whose steps are all solved does not prolong the sequential part.

    **Arguments:**

    - `kernels`: what makes the sequential steps: see `AdaptivePolicy`.

    **Cost:** one attempt, then the remaining steps sequentially, in chunks of 256; in a kernel on a GPU exactly the
    remaining ones. No memory beyond the states.
    """

    kernels: str = eqx.field(static=True, default="auto")

    def solve(self, driver):
        attempt = driver.solve_in_parallel(0, driver.init, driver.end, driver.length)
        # The loop starts at the first unsolved step, and so makes no iteration if there is none. A `cond` would make the
        # steps for every batch.
        meter_state = driver.update_meter(driver.start_meter(), attempt.num_solved)
        y = driver.buffer(attempt.y)
        y, _, meter_state = driver.step_sequentially(y, attempt.num_solved, driver.end, meter_state)
        driver.close_meter(meter_state)
        return RecurrenceSolution.complete(driver.all_states(y), attempt.counts)


# A longer sequence is attempted as a whole first, and then in segments of at most this many steps. On a GPU an iteration on
# fewer steps takes no less time.
_LARGEST_SEGMENT = 16384
# Segments of larger states are shorter: the Jacobians of a segment may have at most this many entries.
_LARGEST_JACOBIANS = 2**24
# The sequential run after an unproductive attempt is this many times as long as the one before.
_BACKOFF = 16


class _Frontier(eqx.Module):
    """How far the solution has come: `y` is a buffer of states that is correct before step `position`. `segment_limit` is
    the number of steps of the next attempt, `sequential_run` the number to make sequentially if that attempt is
    unproductive."""

    y: Float[Array, " M D"]
    position: Int[Array, ""]
    segment_limit: Int[Array, ""]
    sequential_run: Int[Array, ""]
    start_level: Int[Array, ""]
    counts: Counts
    meter_state: PyTree


class AdaptivePolicy(AbstractPolicy):
    """Solves segments in parallel, as long as the dynamics allow, and makes the rest sequentially.

    Use it to solve in parallel on every device, a CPU too, and under adaptive step-size controllers. It decides by progress,
    not by cost. The default, `CostPolicy`, uses it where that is estimated to pay.

    Perturbations of a trajectory grow like `exp(exponent * time)`. From a guess with error `e`, Newton's method converges
    over a time of about `log(1 / e) / exponent`, a number of Lyapunov times, and not beyond. The policy therefore proceeds
    as follows:

    1. It attempts the whole sequence. Newton's method continues on the leading steps on which its updates fall. It solves
       the whole sequence if it can, and otherwise a leading segment.
    2. From the last solved step it attempts the next segment with a new guess. The segment is 1.5 times as long as the last
       solved one, or twice as long if the last attempt solved all its steps.
    3. An attempt that solves fewer than `min_steps` steps is unproductive. After it, `2 min_steps` steps are made
       sequentially, and 16 times as many after each further unproductive attempt in a row.

    The answer is correct in any case: the equations of every segment are verified, and sequential steps are exact.

    On a GPU, explicit steps of up to eight numbers, 2048 or more, are solved by multiple shooting in kernels, with the
    states after intervals of several steps as unknowns. An attempt then makes four iterations, and solves the leading steps
    that have converged. If these are few, the next attempt has a finer guess. So it is with `ParallelNewton()`, its default
    Jacobian and scan, `CoarsePredictor` or `ConstantPredictor`, and an infinite `max_exponent`.

    **Arguments:**

    - `max_exponent`: the largest Lyapunov exponent, per unit of time, with which steps are solved in parallel. An attempt on
        steps over which perturbations grow faster ends after one iteration, and all remaining steps are made sequentially.
        The default, infinity, leaves the decision to progress. `0.0` is the strict rule of the theory, under which an
        oscillator with a slightly positive finite-time exponent is sequential too.
    - `min_steps`: the number of steps that a productive attempt solves, at least 1. An iteration on a GPU takes as long as
        50 to 100 sequential steps, and an attempt takes a handful of iterations.
    - `kernels`: what makes the sequential steps. `"auto"`, the default, is one kernel where the device supports it, unless
        `PARALLEL_DIFFRAX_KERNELS` in the environment says otherwise. `"mosaic"` and `"warp"` ask for that backend, `"off"`
        for XLA. `statistics(sol).kernel_steps` tells which it was.

    **Cost:** if the whole sequence can be solved: one attempt, and one estimate of the growth by `N` products of matrices
    (of intervals, by `N D` products with vectors).
    In segments, every step is part of about two attempts, each a guess and a handful of iterations. The cost of unproductive
    attempts grows with the logarithm of `N`. Memory: the states twice, and the Jacobians of a segment.

    **Raises:** `TypeError` or `ValueError` for arguments out of range; `ValueError` for a finite `max_exponent` with a root
    finder whose Jacobians are approximate, since their products do not measure growth, and for `max_exponent=-math.inf`:
    `Sequential()` makes every step sequentially.

    ??? cite "References"

        Gonzalez, Kozachkov, Zoltowski, Clarkson, Linderman, "Predictability enables parallelization of nonlinear state
        space models", arXiv 2508.16817 (2025).

        Gonzalez, "Parallel Newton methods", arXiv 2603.16850 (2026).
    """

    max_exponent: float = eqx.field(static=True, default=math.inf)
    min_steps: int = eqx.field(static=True, default=128)
    kernels: str = eqx.field(static=True, default="auto")

    def __check_init__(self):
        if not isinstance(self.max_exponent, (int, float)) or not self.max_exponent > -math.inf:
            raise ValueError(
                f"`AdaptivePolicy(max_exponent={self.max_exponent!r})`: expected a Python number or `math.inf`. (To make "
                "every step sequentially, use `policies.Sequential()`.)"
            )
        meaning = "the number of steps that a productive attempt solves"
        check_integer("AdaptivePolicy", "min_steps", self.min_steps, meaning)

    def splits_windows(self, num_steps):
        return num_steps >= 2 * self.min_steps

    def solve(self, driver):
        num_steps = driver.length
        counts = Counts.none(driver.init.dtype)
        if not driver.exact and self.max_exponent != math.inf:
            raise ValueError(
                f"`AdaptivePolicy(max_exponent={self.max_exponent!r})` with `{driver.root_finder!r}`: growth is estimated "
                "from the exact Jacobians of Newton's method. Use `ParallelNewton()` with `jacobian=Dense()`, or leave "
                "`max_exponent` at infinity."
            )
        capacity = min(num_steps, _LARGEST_SEGMENT, max(1024, _LARGEST_JACOBIANS // driver.init.size**2))
        zero, first_run = jnp.array(0), jnp.array(2 * self.min_steps)
        buffer = driver.buffer(capacity=capacity)
        frontier = _Frontier(buffer, zero, jnp.array(num_steps), first_run, zero, counts, driver.start_meter())
        if capacity < num_steps:
            frontier, stop = self._attempt(driver, frontier, num_steps, capacity)
            if self.max_exponent != math.inf:
                frontier = self._step_sequentially(driver, frontier, stop)
            frontier = dataclasses.replace(frontier, sequential_run=first_run)

        def advance(frontier):
            return self._step_sequentially(driver, *self._attempt(driver, frontier, capacity, capacity))

        frontier = lax.while_loop(lambda frontier: frontier.position < driver.end, advance, frontier)
        driver.close_meter(frontier.meter_state)
        return RecurrenceSolution.complete(driver.all_states(frontier.y), frontier.counts)

    def _attempt(
        self, driver: RecurrenceDriver, frontier: _Frontier, room: int, capacity: int
    ) -> tuple[_Frontier, Int[Array, ""]]:
        """Makes one attempt of at most `room` steps from the frontier. The next has at most `capacity`. Returns the frontier
        after it, and the step up to which to go on sequentially."""
        end = driver.end
        # If the sequence is longer than a segment, the first attempt is on the whole sequence.
        whole = room > capacity
        position = 0 if whole else frontier.position
        count = end if whole else jnp.minimum(frontier.segment_limit, end - frontier.position)
        state = driver.state_before(frontier.y, frontier.position)
        max_growth = None
        if self.max_exponent != math.inf:
            step_size = jnp.abs(jnp.asarray(driver.step_size))
            max_growth = self.max_exponent * step_size * jnp.asarray(count, step_size.dtype)
            max_growth = max_growth.astype(state.dtype)
        attempt = None
        if max_growth is None:
            attempt = driver.solve_in_intervals(position, state, count, room, frontier.start_level)
        if attempt is None:
            attempt = driver.solve_in_parallel(
                position, state, count, room, frontier.start_level, monitor_contraction=True, max_growth=max_growth
            )
        num_solved = attempt.num_solved
        reached = frontier.position + num_solved
        productive = (num_solved >= self.min_steps) | (reached >= end)
        stop = jnp.where(productive | attempt.too_coarse, reached, reached + frontier.sequential_run)
        stop = jnp.where(attempt.growth_exceeded, end, stop)
        longer = jnp.where(num_solved >= count, 2 * num_solved, num_solved + num_solved // 2)
        if whole:
            y = driver.buffer(attempt.y, capacity)
        else:
            y = driver.scan.write(frontier.y, attempt.y, frontier.position)
        frontier = _Frontier(
            y=y,
            position=reached,
            segment_limit=jnp.clip(longer, min(4 * self.min_steps, capacity), capacity),
            sequential_run=jnp.where(
                productive, 2 * self.min_steps, jnp.where(attempt.too_coarse, 1, _BACKOFF) * frontier.sequential_run
            ),
            # A start level is valid for one capacity only.
            start_level=jnp.array(0) if whole else attempt.start_level,
            counts=frontier.counts.add(attempt.counts),
            meter_state=frontier.meter_state,
        )
        return frontier, stop

    def _step_sequentially(self, driver: RecurrenceDriver, frontier: _Frontier, stop: Int[Array, ""]) -> _Frontier:
        meter_state = driver.update_meter(frontier.meter_state, frontier.position)
        y, position, meter_state = driver.step_sequentially(frontier.y, frontier.position, stop, meter_state)
        return dataclasses.replace(frontier, y=y, position=position, meter_state=meter_state)


class CostPolicy(_AbstractFollower):
    """Makes steps sequentially or in parallel, whichever is estimated to cost less. The default of `ParallelSolver`.

    Use another policy if you know better, or to see how steps are solved in parallel on a CPU.

    - On a CPU steps are sequential: a step of a small system takes less than a microsecond.
    - On a GPU they are sequential if that is estimated to take less time: where they are few, up to some thousands if they
        run in a kernel, and in large batches, which fill the device with one thread per member.
    - Otherwise `in_parallel` solves them.

    Under an adaptive step-size controller the steps are those that the controller chooses, sequentially, on every device,
    since each depends on the one before. To solve windows of equal steps in parallel there, pass `AdaptivePolicy()` itself.

    The choice is made once, when the program is traced, from the platform, the number of steps, the size of the batch (over
    all nested `jax.vmap`) and of a state, and the operations of a step. `_recurrence/_cost.py` has the estimates. So whether
    steps are attempted in parallel does not depend on the data. Whether they can be solved in parallel does, and
    `in_parallel` decides it while the program runs.

    **Arguments:**

    - `in_parallel`: the policy for steps that are worth it.
    - `kernels`: as in `AdaptivePolicy`.

    **Cost:** that of the chosen policy. On a GPU both are traced if the choice depends on the size of the batch.

    **Raises:** `ValueError` for an unknown `kernels`.
    """

    in_parallel: AbstractPolicy = AdaptivePolicy()
    kernels: str = eqx.field(static=True, default="auto")

    def solve(self, driver):
        sequential = Sequential(self.kernels)
        if on_cpu(self.kernels):
            return sequential.solve(driver)
        num_steps, size, stepper = driver.length, driver.init.size, driver.stepper()

        def pays(members: int) -> bool:
            return parallel_pays(num_steps, size, members, stepper.kernel_operations)

        if not pays(1):
            # The larger the batch, the less it pays.
            return sequential.solve_with(driver, stepper)
        arrays, static = eqx.partition(driver, eqx.is_array)

        def by(policy):
            def solve(arrays):
                return policy.solve(eqx.combine(arrays, static)).with_all_finite()

            return eqx.filter_closure_convert(solve, arrays)

        # Everything that they close over becomes an argument, so that it can have an axis of the batch.
        consts, programs = eqx.partition((by(sequential), by(self.in_parallel)), eqx.is_array)

        def choose(members):
            return lambda consts, arrays: eqx.combine(consts, programs)[pays(members)](arrays)

        return by_batch_size(choose)(consts, arrays)
