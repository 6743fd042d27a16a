"""A scan by GPU kernels of this package."""

import functools

import jax
from jaxtyping import Array, Float

from .._kernels import by_platform, linear_recurrence_in_kernels, scan_kernels_work, suits_kernels
from ._abstract_scan import AbstractScan
from ._arguments import check_instance
from ._scans import BlockedScan, SequentialScan
from ._shifts import shift
from ._transitions import AbstractTransitions, DenseTransitions, DiagonalTransitions


class KernelScan(AbstractScan):
    """Scans linear recurrences in GPU kernels: segments of steps, all at once.

    Use it for linear recurrences with dense, block-diagonal or diagonal transitions in float32 or float64, with blocks of up
    to 16 x 16, on GPUs of compute capability 9.0 (Hopper) or later; by `warp-lang`, if it is installed, from 7.5 on.
    `AutoScan` does so where it pays. The scan `otherwise` evaluates everything else:

    - other operations, structures and dtypes, and tangents of `jax.jvp` directly through this scan;
    - everything on a device whose kernels fail a test at the first use;
    - batches of `jax.vmap` if there is more than one device: XLA may spread a batch over devices, but not a kernel.

    The scan has three parts: the product of each segment; the scan of these products, again in segments; and the steps of
    each segment again, starting from the result of the segments before. Each level is one kernel for the products and one
    for the steps. In a kernel, one thread or a few go through a segment in sequence, so the GPU reads all matrices twice and
    writes little more than the result.

    **Arguments:** `otherwise`, the scan for everything that the kernels do not support.

    **Cost:** work `2 N` matrix-vector products and `N` matrix products; depth about `64 log N / log 32` steps; additional
    memory 1/32 to 1/16 of the elements.

    **Raises:** `TypeError` if `otherwise` is not a scan.
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
            return by_platform(transitions, r, kernel=in_kernels, cpu=in_sequence, default=in_sequence)

        @solve.defjvp
        def _(primals, tangents):
            d = solve(*primals)
            change = tangents[0].apply(shift(d, -1 if reverse else 1))
            return d, self.otherwise.linear(primals[0], tangents[1] + change, reverse=reverse)

        return solve(transitions, r)


def _matrices(transitions: AbstractTransitions) -> Float[Array, " N *B b b"] | None:
    """The blocks of a structure whose blocks act on adjacent components; `None` for other structures."""
    if isinstance(transitions, DenseTransitions):
        return transitions.A
    return transitions.a[..., None, None] if isinstance(transitions, DiagonalTransitions) else None


def solve_in_kernels(
    transitions: AbstractTransitions, r: Float[Array, " N *D"], *, reverse: bool, otherwise: AbstractScan
) -> Float[Array, " N *D"]:
    """`AbstractScan.linear` in kernels. Requires `suits_kernels` and `scan_kernels_work`. `otherwise` evaluates batches that
    may be spread over devices."""
    A = _matrices(transitions)
    assert A is not None
    blocks = A.reshape(A.shape[0], -1, *A.shape[-2:])

    def in_arrays(A, r):
        return otherwise.linear(DenseTransitions(A), r, reverse=reverse)

    return linear_recurrence_in_kernels(blocks, r.reshape(blocks.shape[:-1]), reverse, in_arrays).reshape(r.shape)
