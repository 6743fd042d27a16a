"""What parallel iteration leaves, one step after the other."""

from ._base import AbstractPolicy, Outcome


class ParallelThenSequential(AbstractPolicy):
    """Solves all steps in parallel, and makes those that remain one after the other: always right.

    A `while` loop that starts at the first unsolved step: where all are solved, it runs zero times, also for the other
    members of a batch. Cost: `N - start` steps in sequence (rounded up to chunks of 128), no memory beyond the states.

    **Arguments:** none.
    """

    def complete(self, driver):
        num_steps = driver.length
        attempt = driver.solve_in_parallel(0, driver.init, num_steps, num_steps)
        meter = driver.show(driver.start_meter(), attempt.solved)
        y, _, meter = driver.in_sequence(driver.buffer(attempt.y), attempt.solved, num_steps, meter)
        driver.stop_meter(meter)
        return Outcome.all(y[:num_steps], attempt.counts)
