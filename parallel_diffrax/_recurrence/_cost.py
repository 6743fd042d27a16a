"""What steps cost in parallel and in sequence: the few numbers by which `CostPolicy` chooses.

In seconds, rounded by hand from `benchmarks/results/ensembles_gpu.json`, `regimes_gpu.json` and `steps_gpu.json` (H100 and
H200, JAX 0.11.2). No script fits them. They decide between ways to the same result that often differ tenfold.
"""

# One step in sequence in a kernel: a constant, and each of its scalar operations.
_KERNEL_STEP, _KERNEL_OPERATION = 0.08e-6, 2.0e-9
# Up to this many members of a batch, one thread each, a kernel takes as long as for one.
_FREE_MEMBERS = 16384
# One step in sequence in XLA, with the step in arrays, and how many numbers of all members together it takes at no cost.
_ARRAY_STEP, _FREE_NUMBERS = 40e-6, 2**17
# A solve in parallel: a constant, and each entry of the Jacobians of all steps, for all iterations together.
_SOLVE, _ENTRY = 0.75e-3, 2.0e-9


def seconds_in_sequence(num_steps: int, size: int, members: int, kernel_operations: float | None) -> float:
    """The time to make `num_steps` steps of a state of `size` numbers one after the other, for a batch of `members`.
    `kernel_operations` is the number of scalar operations of a step if it is a kernel, else `None`."""
    if kernel_operations is None:
        return num_steps * _ARRAY_STEP * max(1.0, size * members / _FREE_NUMBERS)
    return num_steps * (_KERNEL_STEP + _KERNEL_OPERATION * kernel_operations) * max(1.0, members / _FREE_MEMBERS)


def seconds_in_parallel(num_steps: int, size: int, members: int) -> float:
    """The time to solve the same steps together."""
    return _SOLVE + _ENTRY * num_steps * members * max(size, 1) ** 2
