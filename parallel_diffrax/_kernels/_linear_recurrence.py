"""A linear recurrence in segments, as two kernels per level."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._probe import backend, platform
from ._threads import Launch


_DTYPES = frozenset(map(np.dtype, (np.float32, np.float64)))
# Larger matrices need too many registers per thread.
LARGEST_SIZE = 16
# Up to this matrix size, segments are long, and a thread holds the whole product of a segment.
_SMALL_SIZE = 4
# Limits of prefetching, in bytes per thread and in steps.
_BYTES_AHEAD = 320
_MOST_STEPS_AHEAD = 8
# With this many segments or more, one thread per segment keeps a GPU busy.
_MANY_SEGMENTS = 2**14


def suits_kernels(A: Array, r: Array) -> bool:
    """Whether the kernels support these matrices and right-hand sides."""
    return A.shape[-1] <= LARGEST_SIZE and A.dtype == r.dtype and r.dtype in _DTYPES and r.size > 0


def linear_recurrence_in_kernels(
    A: Float[Array, "N B b b"], r: Float[Array, "N B b"], reverse: bool, otherwise: Callable[[Array, Array], Array]
) -> Float[Array, "N B b"]:
    """`d[i] = A[i] d[i-1] + r[i]` with `d[-1] = 0`, for each block; in reverse, `d[i] = A[i] d[i+1] + r[i]`.

    Requires `suits_kernels(A, r)` and `scan_kernels_work()`. `otherwise` is the same function of `(A, r)` in XLA, for
    batches that may be spread over several devices. Every level reads its matrices twice and writes little more than the
    result. The depth is about `64 log N / log 32`.
    """
    launch = backend(passes_scan_test)
    assert launch is not None
    return _in_batches(launch, reverse, otherwise)(A[None], r[None])[0]


def _in_batches(launch: Launch, reverse: bool, otherwise: Callable):
    """Runs the kernels. A batch axis adds threads of the same kind."""

    def plain(A, r):
        return otherwise(A[0], r[0])[None]

    @jax.custom_batching.custom_vmap
    def run(A, r):
        return _solve(launch, A, r, reverse)

    @run.def_vmap
    def _(axis_size, in_batched, A, r):
        A_batched, r_batched = in_batched
        if jax.device_count() > 1:
            axes = tuple(0 if batched else None for batched in in_batched)
            return jax.vmap(plain, in_axes=axes, axis_size=axis_size)(A, r), True
        if not r_batched:
            r = jnp.broadcast_to(r, (axis_size, *r.shape))
        # Right-hand sides that share matrices are adjacent.
        r = r if A_batched else jnp.swapaxes(r, 0, 1)
        A = A.reshape(-1, *A.shape[2:]) if A_batched else A
        d = run(A, r.reshape(-1, *r.shape[2:])).reshape(r.shape)
        return d if A_batched else jnp.swapaxes(d, 0, 1), True

    return run


@dataclasses.dataclass(frozen=True)
class _Level:
    """How one level of `batch` recurrences, each of `num_blocks` blocks of size `size`, is cut into segments. `matrices`, a
    divisor of `batch`, is the number of sets of matrices: adjacent recurrences share one. `first`: is it the first level?"""

    batch: int
    matrices: int
    num_steps: int
    num_blocks: int
    size: int
    reverse: bool
    first: bool
    dtype: np.dtype

    @property
    def length(self) -> int:
        """The number of steps in a segment."""
        if self.size <= _SMALL_SIZE:
            return 32
        # Products take long if there are few at a time, so later levels have shorter segments.
        return 16 if self.first else 8

    @property
    def num_segments(self) -> int:
        return -(-self.num_steps // self.length)

    @property
    def num_parts(self) -> int:
        """The number of segments in all blocks of all recurrences."""
        return self.batch * self.num_segments * self.num_blocks

    @property
    def columns(self) -> int:
        """The number of columns of a product per thread. One if there are few threads; otherwise as many as fit into the
        registers, since each thread also computes the vectors."""
        if not self.first or self.num_parts < _MANY_SEGMENTS // self.size:
            return 1
        return self.size if self.size <= _SMALL_SIZE else math.gcd(self.size, 2)

    @property
    def lanes(self) -> int:
        """The number of threads that share the rows of a step."""
        if self.size <= 2 and self.num_parts >= _MANY_SEGMENTS:
            return 1
        return 1 << (self.size - 1).bit_length()

    def ahead(self, numbers: int) -> int:
        """The number of steps to prefetch if each step reads `numbers` numbers."""
        return max(1, min(_MOST_STEPS_AHEAD, _BYTES_AHEAD // (numbers * self.dtype.itemsize)))

    def part(self, index, count: int):
        """The block, the segment (of `count`) and the recurrence that belong to `index`, where the block varies fastest."""
        return index % self.num_blocks, index // self.num_blocks % count, index // (self.num_blocks * count)

    def place(self, batch, n, block):
        """The position among the vectors of block `block` of the `n`-th step in the direction of time."""
        n = self.num_steps - 1 - n if self.reverse else n
        return (batch * self.num_steps + n) * self.num_blocks + block

    def matrix_place(self, batch, n, block):
        """The position among the matrices, as in `place`."""
        return self.place(batch // (self.batch // self.matrices), n, block)


def _solve(
    launch: Launch, A: Float[Array, "M N B b b"], r: Float[Array, "K N B b"], reverse: bool, first: bool = True
) -> Float[Array, "K N B b"]:
    """`d[i] = A[i] d[i-1] + r[i]` for `K` recurrences. Each `K / M` adjacent ones share their matrices."""
    batch, num_steps, num_blocks, size = r.shape
    level = _Level(batch, A.shape[0], num_steps, num_blocks, size, reverse, first, np.dtype(r.dtype))
    segments = level.num_segments
    operands = [A, r]
    if segments > 1:
        # No segment needs the total of the last one.
        totals = batch, segments - 1, num_blocks, size
        outputs = [jax.ShapeDtypeStruct(shape, r.dtype) for shape in ((*totals, size), totals)]
        group = size // level.columns
        count = math.prod(totals[:3]) * group
        program = functools.partial(_reduce, level)
        products, sums = launch(program, operands, outputs, count, group, "scan_reduce")
        operands.append(_solve(launch, products, sums, reverse=False, first=False))
    program, outputs = functools.partial(_replay, level), [jax.ShapeDtypeStruct(r.shape, r.dtype)]
    return launch(program, operands, outputs, level.num_parts * level.lanes, level.lanes, "scan_replay")[0]


def _reduce(level: _Level, threads, index, A, r, products, sums):
    """The product of the matrices of a segment, and the result of its steps from zero. Each thread computes some columns of
    the product. The product of the first segment is never used, so `A[0]` may hold anything."""
    size, columns, count = level.size, level.columns, level.num_segments - 1
    column, index = index % (size // columns) * columns, index // (size // columns)
    block, segment, batch = level.part(index, count)

    def read(k):
        n = segment * level.length + k
        start = level.matrix_place(batch, n, block) * size**2
        rows = [threads.load(A, start + i * size, size) for i in range(size)]
        return rows, threads.load(r, level.place(batch, n, block) * size, size)

    def go(k, carry, count):
        vectors = [carry[c * size : (c + 1) * size] for c in range(columns + 1)]
        for rows, r in [read(k + j) for j in range(count)]:
            vectors = [_product(threads, rows, x, r if c == columns else None) for c, x in enumerate(vectors)]
        return [x for vector in vectors for x in vector]

    start = level.matrix_place(batch, segment * level.length, block) * size**2
    rows = [threads.load(A, start + i * size + column, columns) for i in range(size)]
    carry = [row[c] for c in range(columns) for row in rows]
    carry += threads.load(r, level.place(batch, segment * level.length, block) * size, size)
    carry = _in_steps(threads, go, carry, level.length - 1, level.ahead(size**2 + size))
    start = ((batch * count + segment) * level.num_blocks + block) * size
    for i in range(size):
        threads.store(products, (start + i) * size + column, [carry[c * size + i] for c in range(columns)])
    # All threads of a segment hold the same sums and write the same numbers.
    threads.store(sums, start, carry[columns * size :])


def _product(threads, rows, x, r=None):
    """A matrix times a vector, plus `r`."""
    out = []
    for i, row in enumerate(rows):
        total = row[0] * x[0] if r is None else threads.multiply_add(row[0], x[0], r[i])
        for a, b in zip(row[1:], x[1:]):
            total = threads.multiply_add(a, b, total)
        out.append(total)
    return out


def _replay(level: _Level, threads, index, A, r, *arrays):
    """The steps of a segment, starting from the result of the segments before. Each thread computes one row or all rows."""
    *carries, out = arrays
    size, lanes, count = level.size, level.lanes, level.num_segments
    row, index = threads.smaller(index % lanes, size - 1), index // lanes
    block, segment, batch = level.part(index, count)
    ragged = level.num_steps % level.length != 0
    # A thread computes `height` rows from `row` on.
    height, row = (size, 0) if lanes == 1 else (1, row)

    def read(k):
        n, inside = segment * level.length + k, None
        if ragged:
            # Beyond the end, the last step is read again and its result is dropped.
            n, inside = threads.smaller(n, level.num_steps - 1), n < level.num_steps
        place, start = level.place(batch, n, block) * size + row, level.matrix_place(batch, n, block) * size + row
        rows = [threads.load(A, (start + i) * size, size) for i in range(height)]
        return place, rows, threads.load(r, place, height), inside

    def step(rows, d, r):
        return _product(threads, rows, d if lanes == 1 else threads.exchange(d[0], lanes, size), r)

    def select(condition, then, otherwise):
        return [threads.select(condition, x, y) for x, y in zip(then, otherwise)]

    def go(k, d, count):
        for place, rows, r, inside in [read(k + j) for j in range(count)]:
            new = step(rows, d, r)
            d = new if inside is None else select(inside, new, d)
            threads.store(out, place, d)
        return d

    place, rows, d, _ = read(0)
    if carries:
        before = (batch * (count - 1) + threads.larger(segment - 1, 0)) * level.num_blocks + block
        before = threads.load(carries[0], before * size + row, height)
        # The first segment starts from zero.
        d = select(segment < 1, d, step(rows, before, d))
    threads.store(out, place, d)
    _in_steps(threads, go, d, min(level.length, level.num_steps) - 1, level.ahead((size + 1) * height))


def _in_steps(threads, go, carry, count: int, ahead: int):
    """Makes the steps `1 .. count` by `go(k, carry, n)`, which makes `n` steps from step `k` on."""
    odd = count % ahead
    carry = go(1, carry, odd) if odd > 0 else carry
    if count < ahead:
        return carry
    return threads.loop(count // ahead, lambda k, carry: go(k * ahead + (1 + odd), carry, ahead), carry)


def scan_kernels_work() -> bool:
    """Whether the default device is a GPU that runs these kernels. Runs them once to find out."""
    return platform() == "cuda" and backend(passes_scan_test) is not None


def passes_scan_test(launch: Launch) -> bool:
    """Whether the default device solves a recurrence of 75 steps in three segments with a known result."""
    rng = np.random.default_rng(0)
    A, r = rng.uniform(-0.5, 0.5, (1, 75, 1, 3, 3)), rng.uniform(-1, 1, (1, 75, 1, 3))
    want = r.copy()
    for i in range(1, 75):
        want[0, i, 0] += A[0, i, 0] @ want[0, i - 1, 0]
    # A compiled program: this runs while something else is being traced.
    args = A.astype(np.float32), r.astype(np.float32)
    program = jax.jit(functools.partial(_solve, launch, reverse=False)).trace(*args).lower(lowering_platforms=("cuda",))
    return bool(np.allclose(program.compile()(*args), want, rtol=0, atol=1e-5))
