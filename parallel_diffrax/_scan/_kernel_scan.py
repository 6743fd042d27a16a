"""A scan by GPU kernels of our own."""

import functools

import jax
import jax.lax as lax
from jaxtyping import Array, Float

from .._kernels import linear_recurrence_in_kernels, scan_kernels_work, suits_kernels
from ._abstract_scan import AbstractScan
from ._arguments import check_instance
from ._blocked_scan import BlockedScan
from ._sequential_scan import SequentialScan
from ._shifts import shift
from ._transitions import AbstractTransitions, DenseTransitions, DiagonalTransitions


class KernelScan(AbstractScan):
    """Stretches of steps, all at once: the product of each; the scan of these products, in segments again; and the
    steps of each once more, from the result of the segments before. Every level is a kernel for the products and one for
    the steps, in which a thread, or a few, go through a segment in sequence: a GPU reads all matrices twice and writes
    hardly more than the result.

    For linear recurrences with full, block-diagonal or diagonal transitions, of blocks up to 16 x 16, in float32 or float64,
    on GPUs of compute capability 9.0 (Hopper) or later. Everything else is left to `otherwise`, as is everything on a
    device whose kernels fail a test at the first use; and `jax.vmap` where there is more than one device, over which XLA
    may spread a batch, but no kernel.

    Work `2 N` compositions with vectors and `N` of matrices, depth about `64 log N / log 32` steps, memory a 16th to a 32nd
    of the elements besides.

    **Arguments:**

    - `otherwise`: the scan that does what the kernels do not.

    **Raises:** `TypeError` for an `otherwise` that is no scan.
    """

    otherwise: AbstractScan = BlockedScan()

    def __check_init__(self):
        check_instance("KernelScan", "otherwise", self.otherwise, AbstractScan, "AssociativeScan()")

    def prefix(self, compose, elements, *, reverse=False):
        return self.otherwise.prefix(compose, elements, reverse=reverse)

    def linear(self, transitions, r, *, reverse=False):
        A = _matrices(transitions)
        if A is None or not suits_kernels(A, r) or not scan_kernels_work():
            return self.otherwise.linear(transitions, r, reverse=reverse)

        @jax.custom_jvp
        def solve(transitions, r):
            in_kernels = functools.partial(solve_in_kernels, reverse=reverse, otherwise=self.otherwise)
            in_sequence = functools.partial(SequentialScan().linear, reverse=reverse)
            return lax.platform_dependent(transitions, r, cuda=in_kernels, default=in_sequence)

        @solve.defjvp
        def _(primals, tangents):
            d = solve(*primals)
            change = tangents[0].apply(shift(d, -1 if reverse else 1))
            return d, self.otherwise.linear(primals[0], tangents[1] + change, reverse=reverse)

        return solve(transitions, r)


def _matrices(transitions: AbstractTransitions) -> Float[Array, " N *B b b"] | None:
    """The blocks of a structure whose blocks act on neighbouring components; `None` for other structures."""
    if isinstance(transitions, DenseTransitions):
        return transitions.A
    return transitions.a[..., None, None] if isinstance(transitions, DiagonalTransitions) else None


def solve_in_kernels(
    transitions: AbstractTransitions, r: Float[Array, " N *D"], *, reverse: bool, otherwise: AbstractScan
) -> Float[Array, " N *D"]:
    """`AbstractScan.linear`, where `suits_kernels` and `scan_kernels_work`; batches that may be spread over devices by
    `otherwise`."""
    A = _matrices(transitions)
    assert A is not None
    num_steps, size = A.shape[0], A.shape[-1]
    blocks = A.reshape(num_steps, -1, size, size)

    def in_arrays(A, r):
        return otherwise.linear(DenseTransitions(A), r, reverse=reverse)

    return linear_recurrence_in_kernels(blocks, r.reshape(num_steps, -1, size), reverse, in_arrays).reshape(r.shape)
