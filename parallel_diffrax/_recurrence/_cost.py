"""What steps cost in parallel and in sequence: the few numbers by which `CostPolicy` chooses.

In seconds, fitted by `benchmarks/cost.py` (`benchmarks/results/cost_gpu.json`: one H100, JAX 0.11.2) and rounded by hand.
They decide between ways to the same result that often differ tenfold.
"""

import dataclasses

from .._kernels import on_cpu
from .._scan import AbstractScan, AutoScan, KernelScan


# A solve in sequence: a constant.
_SEQUENCE = 0.15e-3
# One step in sequence in a kernel: a constant, and each of its scalar operations.
_KERNEL_STEP, _KERNEL_OPERATION = 0.12e-6, 0.75e-9
# Up to this many members of a batch, one thread each, a kernel takes as long as for one.
_FREE_MEMBERS = 8192
# One step in sequence in XLA, with the step in arrays, and how many numbers of all members together it takes at no cost.
_ARRAY_STEP, _FREE_NUMBERS = 40e-6, 2**17
# A solve in parallel on all steps: a constant, and each entry of the Jacobians of all steps, for all iterations together.
_SOLVE, _ENTRY = 0.85e-3, 0.75e-9
# The same by multiple shooting in kernels.
_SHOOTING, _SHOOTING_ENTRY = 0.65e-3, 0.1e-9
# One step of Diffrax's loop, of a small state by an explicit method. Larger states and implicit steps take longer.
_DIFFRAX_STEP = 0.135e-3
# A solve in parallel with its gradient takes up to this many times the memory of the Jacobians of its steps.
_MEMORY = 12


# There are about `_INTERVALS` intervals of multiple shooting or more, and at least `_FEWEST`, of `_SHORTEST` to `_LONGEST`
# steps. (H100, 16384 steps in intervals of 8 / 16 / 32: 0.58 / 0.61 / 0.69 ms; 2^20 in intervals of 64 / 128: 1.48 / 1.74.)
_INTERVALS, _FEWEST, _SHORTEST, _LONGEST = 2048, 512, 4, 64
# The largest state for which a thread holds a step with a tangent in its registers.
_MOST_NUMBERS = 8


# The fewest entries of all Jacobians for which derivatives make products in intervals, instead of the Jacobians. (H100,
# gradient of 16384 / 262144 steps with D = 2: 1.34 / 1.49 ms in intervals, 1.16 / 2.23 ms by Jacobians.)
_MOST_ENTRIES = 2**18


def derivative_interval_length(num_steps: int, size: int) -> int:
    """The number of steps in each interval of the products of a derivative. One if Jacobians are faster."""
    return interval_length(num_steps, size) if num_steps * size**2 > _MOST_ENTRIES else 1


def interval_length(num_steps: int, size: int) -> int:
    """The number of steps in each interval of multiple shooting: a power of two. One if it does not pay."""
    if num_steps < _FEWEST * _SHORTEST or size > _MOST_NUMBERS:
        return 1
    return min(max(2 ** max(0, (num_steps // _INTERVALS).bit_length() - 1), _SHORTEST), _LONGEST)


def supports_intervals(scan: AbstractScan, kernels: str) -> bool:
    """Whether intervals of steps may be made in kernels of this backend: not if the user spreads steps over devices or
    chooses another way to scan them, nor on a CPU."""
    return type(scan) in (AutoScan, KernelScan) and not on_cpu(kernels)


def seconds_in_sequence(num_steps: int, size: int, members: int, kernel_operations: float | None) -> float:
    """The time to make `num_steps` steps of a state of `size` numbers one after the other, for a batch of `members`.
    `kernel_operations` is the number of scalar operations of a step if it is a kernel, else `None`."""
    if kernel_operations is None:
        return _SEQUENCE + num_steps * _ARRAY_STEP * max(1.0, size * members / _FREE_NUMBERS)
    step = _KERNEL_STEP + _KERNEL_OPERATION * kernel_operations
    return _SEQUENCE + num_steps * step * max(1.0, members / _FREE_MEMBERS)


def seconds_in_parallel(num_steps: int, size: int, members: int, kernel_operations: float | None) -> float:
    """The time to solve the same steps together."""
    shooting = kernel_operations is not None and interval_length(num_steps, size) > 1
    constant, entry = (_SHOOTING, _SHOOTING_ENTRY) if shooting else (_SOLVE, _ENTRY)
    return constant + entry * num_steps * members * max(size, 1) ** 2


def parallel_pays(num_steps: int, size: int, members: int, kernel_operations: float | None) -> bool:
    """Whether `CostPolicy` solves steps together on a GPU."""
    return seconds_in_parallel(num_steps, size, members, kernel_operations) < seconds_in_sequence(
        num_steps, size, members, kernel_operations
    )


@dataclasses.dataclass(frozen=True)
class CostEstimate:
    """What a solve is estimated to cost on a GPU, and which way the default policy takes there. `estimate_cost` returns it,
    and `print` shows it.

    The estimates are those by which `CostPolicy` chooses. They come from measurements on one H100, in double precision, of
    small explicit steps, and are within a factor of three of those. They are without compilation.

    **Attributes:**

    - `num_steps`, `state_size`, `batch_size`: `N`, `D` (the real numbers of one state) and the members of the batch.
    - `kernel_operations`: the scalar operations of a step, if it can be made in a kernel; `None` if XLA makes it.
    - `seconds_in_sequence`: the time to make the steps one after the other with this package.
    - `seconds_in_parallel`: the time to solve them together, if Newton's method converges on them as it does on smooth
        problems. Whether it does, and in how many segments, only a solve can tell: see `statistics`.
    - `seconds_by_diffrax`: the least time that Diffrax takes, by the number of steps. Large states, large batches and
        implicit steps take longer.
    - `bytes_in_parallel`: the most memory that a solve in parallel takes with its gradient.
    """

    num_steps: int
    state_size: int
    batch_size: int
    kernel_operations: float | None
    seconds_in_sequence: float
    seconds_in_parallel: float
    seconds_by_diffrax: float
    bytes_in_parallel: int

    @classmethod
    def of(
        cls, num_steps: int, state_size: int, batch_size: int, kernel_operations: float | None, itemsize: int
    ) -> "CostEstimate":
        """The estimate for a state of numbers of `itemsize` bytes."""
        return cls(
            num_steps,
            state_size,
            batch_size,
            kernel_operations,
            seconds_in_sequence(num_steps, state_size, batch_size, kernel_operations),
            seconds_in_parallel(num_steps, state_size, batch_size, kernel_operations),
            num_steps * _DIFFRAX_STEP,
            _MEMORY * num_steps * batch_size * state_size**2 * itemsize,
        )

    @property
    def choice(self) -> str:
        """`"in parallel"` or `"in sequence"`: how `CostPolicy` makes steps of known lengths on a GPU."""
        pays = parallel_pays(self.num_steps, self.state_size, self.batch_size, self.kernel_operations)
        return "in parallel" if pays else "in sequence"

    def __str__(self) -> str:
        how = "by XLA" if self.kernel_operations is None else f"in a kernel, {self.kernel_operations:.0f} operations"
        return "\n".join(
            [
                f"{self.num_steps} steps of {self.state_size} numbers, batch of {self.batch_size}, on a GPU:",
                f"in sequence: {1e3 * self.seconds_in_sequence:.3g} ms ({how})",
                f"in parallel: {1e3 * self.seconds_in_parallel:.3g} ms, if Newton's method converges, and at most "
                f"{self.bytes_in_parallel / 2**20:.3g} MiB with the gradient",
                f"Diffrax: at least {1e3 * self.seconds_by_diffrax:.3g} ms",
                f"choice: {self.choice}",
            ]
        )
