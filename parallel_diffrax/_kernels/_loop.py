"""A loop over few numbers as a single GPU kernel, for one member or a batch of them.

XLA launches the kernels of a loop's body anew in every iteration, about a microsecond each, and the host checks whether the
loop continues, 15 microseconds each. Here the loop is one kernel, with one thread per member of a batch. Its numbers are in
registers, and each thread ends when its member is done.

Unsupported cases are detected up front: loops with known results are run once on the device, and every kernel is lowered
once by itself.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import eval_jaxpr
from jaxtyping import Array, Bool, Int, PyTree

from ._batches import any_member, by_batch_size, in_batches
from ._operations import as_number, COMMON_FUNCTIONS, DTYPES, FUNCTIONS, InBackend, unsupported, uses_rare_operations
from ._probe import backend, by_platform, decline, on_cpu, platform
from ._scalarise import as_scalars, object_array, ScalarFunction, scalarise, Stored
from ._threads import Launch


# Bodies with more scalar operations than this are left to XLA.
_MAX_COST = 8000.0
# On a CPU, bodies with more scalar operations than this stay in arrays: they would take long to compile.
_MAX_CPU_COST = 1500.0
# Larger arrays are operands of their own. Smaller ones are packed together, which saves copies.
_LARGEST_PACKED = 2048
# The most numbers that the body closes over and a thread keeps in registers. More are read again in every iteration.
_MOST_IN_REGISTERS = 32

LoopBody = Callable[[PyTree, PyTree], tuple[PyTree, PyTree, Int[Array, ""], Int[Array, ""]]]


def indexed_loop(
    body: LoopBody,
    carry: PyTree,
    index: Int[Array, ""],
    tables: PyTree,
    num_outputs: int,
    kernels: str = "auto",
    descending: bool = False,
    otherwise: Callable | None = None,
) -> tuple[PyTree, PyTree, Bool[Array, ""]]:
    """A loop of unknown length that writes one output per iteration:

        while index >= 0:
            carry, output, slot, index = body(carry, tables[index])
            outputs[slot] = output

    Returns `carry` at the end, `outputs`, whose unwritten entries are arbitrary, and whether a kernel made them. Arrays are
    small and have no tangents.

    `slot` must be in `0 .. num_outputs - 1`. The first is 0 or 1, and each is that of the iteration before, or the next.
    Tables are read in order: the next `index` is `index + 1`, within the tables, or negative; `index - 1` if `descending`,
    where slots are any on a GPU. Without tables it is any number. `otherwise(body, carry, index, tables)`, if given, returns
    the carry and the outputs by loops of XLA's that suit the caller better.

    One kernel where the device supports it, by the backend `kernels` (see `setting`). Otherwise XLA's loop, with a small
    body in scalars on devices that launch kernels, and on a CPU for one member, where it takes a third of the time.
    """
    made_by = lambda kernel, loop: (*loop, jnp.array(kernel))
    by_xla = otherwise or functools.partial(loop_in_arrays, num_outputs=num_outputs)
    in_arrays = lambda carry, index, tables: made_by(False, by_xla(body, carry, index, tables))
    first = jtu.tree_map(lambda x: x[0], tables)
    if on_cpu(kernels):
        fast = in_scalars(body, carry, first, max_cost=_MAX_CPU_COST)
        if fast is body:
            return in_arrays(carry, index, tables)
        alone = lambda carry, index, tables: made_by(False, by_xla(fast, carry, index, tables))
        *loop, kernel = _by_members(alone, in_arrays, carry, index, tables)
        # (Outside of a traced program it may be a number of Python's.)
        return (*loop, jnp.asarray(kernel))
    kernel = kernel_loop(body, carry, tables, num_outputs, _MAX_COST, kernels, descending)
    if kernel is not None:

        def repeated(carry, index, tables, operands):
            return made_by(False, loop_in_arrays(kernel.body(operands), carry, index, tables, num_outputs))

        in_kernel = in_batches(lambda *args: made_by(True, kernel.run(*args)), repeated)
        here = lambda carry, index, tables: in_kernel(carry, index, tables, kernel.operands)
        return by_platform(carry, index, tables, kernel=here, cpu=in_arrays, default=in_arrays)
    if otherwise is not None:
        return in_arrays(carry, index, tables)
    fast = in_scalars(body, carry, first)
    on_device = lambda carry, index, tables: made_by(False, loop_in_arrays(fast, carry, index, tables, num_outputs))
    return lax.platform_dependent(carry, index, tables, cpu=in_arrays, default=on_device)


def _by_members(alone: Callable, together: Callable, *args):
    """`alone(*args)` for one member, `together(*args)` in a batch."""
    convert = lambda fn: eqx.partition(eqx.filter_closure_convert(fn, *args), eqx.is_array)
    (arrays, static), (batch_arrays, batch_static) = convert(alone), convert(together)
    for_one = lambda arrays, _, *args: eqx.combine(arrays, static)(*args)
    for_many = lambda _, arrays, *args: eqx.combine(arrays, batch_static)(*args)
    return by_batch_size(lambda size: for_one if size == 1 else for_many)(arrays, batch_arrays, *args)


def loop_in_arrays(body: LoopBody, carry, index, tables, num_outputs: int) -> tuple[PyTree, PyTree]:
    """`indexed_loop` as loops of XLA's: an outer loop over chunks of iterations, with the outputs of a chunk in a small
    array. On a CPU, XLA compiles a loop over little memory as one function (0.1 us an iteration instead of 1 us).

    In a batch, the loops run until the last member is done. A loop whose condition had an axis of the batch would copy all
    outputs in every iteration."""
    _, like, *_ = jax.eval_shape(body, carry, jtu.tree_map(lambda x: x[0], tables))
    chunk = _chunk_length(like) if jax.default_backend() == "cpu" and jtu.tree_leaves(like) else 0
    zeros = lambda length: jtu.tree_map(lambda x: jnp.zeros((length, *x.shape), x.dtype), like)
    put = lambda outputs, new, at: jtu.tree_map(
        lambda x, new: lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), at, 0), outputs, new
    )

    def advance(state, first, room: int):
        """One iteration. The output of slot `first + k` goes to entry `k`, that of a member that is done to entry `room`."""
        carry, outputs, index, slot = state
        active = index >= 0
        entry = jtu.tree_map(lambda x: x[jnp.maximum(index, 0)], tables)
        new, output, at, following = body(carry, entry)
        carry = jtu.tree_map(lambda new, old: jnp.where(active, new, old), new, carry)
        outputs = put(outputs, output, jnp.where(active, at.astype(jnp.int32) - first, room))
        return carry, outputs, jnp.where(active, following.astype(jnp.int32), -1), jnp.where(active, at, slot)

    index, zero = index.astype(jnp.int32), jnp.zeros((), jnp.int32)
    unfinished = lambda state: any_member(state[2] >= 0)
    if chunk == 0:
        start = carry, zeros(num_outputs + 1), index, zero
        carry, outputs, *_ = lax.while_loop(unfinished, lambda state: advance(state, 0, num_outputs), start)
    else:
        # A slot may be written again in the next chunk, whose first entry is therefore the last slot of this one.
        def advance_chunk(state):
            (carry, outputs, index, first), last = state
            start = (carry, put(zeros(chunk + 2), last, 0), index, first), zero
            one = lambda loop: (advance(loop[0], first, chunk + 1), loop[1] + 1)
            (carry, found, index, slot), _ = lax.while_loop(
                lambda loop: unfinished(loop[0]) & (loop[1] < chunk), one, start
            )
            last = jtu.tree_map(lambda x: x[slot - first], found)
            found = jtu.tree_map(lambda x: x[: chunk + 1], found)
            outputs = jtu.tree_map(lambda x, new: lax.dynamic_update_slice_in_dim(x, new, first, 0), outputs, found)
            return (carry, outputs, index, slot), last

        start = (carry, zeros(num_outputs + chunk), index, zero), jtu.tree_map(lambda x: x[0], zeros(1))
        (carry, outputs, *_), _ = lax.while_loop(lambda state: unfinished(state[0]), advance_chunk, start)
    return carry, jtu.tree_map(lambda x: x[:num_outputs], outputs)


# The outputs of a chunk of iterations take about this many bytes, and there are at most and at least this many. Where one
# iteration's take more, there are no chunks.
_CHUNK_BYTES, _LONGEST_CHUNK, _SHORTEST_CHUNK = 400, 32, 4


def _chunk_length(output: PyTree) -> int:
    size = sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(output))
    if size > _CHUNK_BYTES:
        return 0
    return max(_SHORTEST_CHUNK, min(_LONGEST_CHUNK, _CHUNK_BYTES // max(size, 1)))


def in_scalars(fn: Callable, *examples: PyTree, max_cost: float = _MAX_COST) -> Callable:
    """`fn` in scalars, with arrays as arguments and results. `fn` itself if it cannot be rewritten, or has more than
    `max_cost` scalar operations."""
    scalar = scalarise(fn, *examples, max_cost=_MAX_COST)
    if scalar is None or scalar.xla_cost > max_cost:
        return fn

    def rewritten(*args):
        try:
            outs = scalar(*jtu.tree_map(as_scalars, args))
        except Exception:  # of any kind: an optional fast path must never be the reason that nothing runs
            return fn(*args)
        return jtu.tree_map(lambda x, like: jnp.stack(list(x.ravel())).reshape(like.shape), outs, scalar.structure)

    return rewritten


def kernel_loop(
    body: LoopBody,
    carry: PyTree,
    tables: PyTree,
    num_outputs: int,
    max_cost: float,
    kernels: str = "auto",
    descending: bool = False,
) -> "KernelLoop | None":
    """An `indexed_loop` as one kernel, from an example of its arguments, by the backend `kernels` (see `setting`). `None` if
    the device or the kernel compiler does not support it, or if an iteration has more than `max_cost` scalar operations, for
    which a kernel does not pay."""
    launch = backend(passes_common_test, kernels)
    if launch is None:
        return None
    loop = build(body, carry, tables, num_outputs, max_cost, launch, descending)
    if loop is None or (uses_rare_operations(loop.scalar) and backend(passes_rare_test, kernels) is not launch):
        return None
    try:
        loop.lower(platform())
    except Exception as error:  # of any kind: an optional fast path must never be the reason that nothing runs
        decline(f"a kernel could not be lowered: {type(error).__name__}: {error}")
        return None
    return loop


def wide_loop(loop: "KernelLoop") -> Callable:
    """A loop that is one kernel, for many members of the caller's own: `wide_loop(loop)(widen)(carry, index, tables,
    operands)` is `widen(one)(...)` of the loop `one` of a member, which returns the carry and the outputs. In a batch, or on
    a platform without kernels, the members are those of the batch together with the caller's."""
    one = lambda carry, index, tables, operands: loop_in_arrays(
        loop.body(operands), carry, index, tables, loop.num_outputs
    )

    def wide(widen: Callable) -> Callable:
        in_arrays = widen(one)
        in_kernel = in_batches(widen(loop.run), in_arrays)
        return functools.partial(by_platform, kernel=in_kernel, cpu=in_arrays, default=in_arrays)

    return wide


def loop_operations(body: LoopBody, carry: PyTree, tables: PyTree, num_outputs: int, max_cost: float) -> float | None:
    """The number of scalar operations of an iteration in a kernel, whatever the device; `None` if there can be no kernel.
    (A backend may still decline it.)"""
    loop = build(body, carry, tables, num_outputs, max_cost, _never)
    return None if loop is None else loop.scalar.cost


def _never(*args, **kwargs):
    raise AssertionError("this loop is only counted")


class _Place(NamedTuple):
    """Where an array is stored: in which buffer, from which index on, and along which batch axes it varies."""

    buffer: int
    start: int
    batched: tuple[bool, ...]


class _Layout:
    """How arrays are stored in buffers, with batch axes of the given sizes.

    Number `k` of all members is adjacent, so that adjacent threads access adjacent numbers. Small arrays of a dtype share a
    buffer. Booleans are stored as integers.
    """

    def __init__(self, sizes: tuple[int, ...]):
        self.sizes, self.buffers = sizes, []
        self.shared: dict[np.dtype, list] = {}

    def pack(self, x: Array, batched: tuple[bool, ...]) -> _Place:
        """Stores an array whose leading axes are the batch axes along which it is `batched`."""
        x = x.astype(_stored(x.dtype))
        flat = jnp.reshape(x, (self.count(batched), -1)).T.reshape(-1)
        if flat.size > _LARGEST_PACKED:
            self.buffers.append(flat)
            return _Place(len(self.buffers) - 1, 0, batched)
        if x.dtype not in self.shared:
            self.shared[x.dtype] = [len(self.buffers), 0, []]
            self.buffers.append(None)
        group = self.shared[x.dtype]
        buffer, start, parts = group
        parts.append(flat)
        group[1] += flat.size
        return _Place(buffer, start, batched)

    def operands(self) -> list[Array]:
        """The buffers."""
        for buffer, _, parts in self.shared.values():
            self.buffers[buffer] = jnp.concatenate(parts)
        return self.buffers

    def count(self, batched: tuple[bool, ...]) -> int:
        """The number of members along these batch axes."""
        return math.prod(size for size, flag in zip(self.sizes, batched) if flag)

    def address(self, place: _Place, member, number):
        """The index of a number of an array, for member `member` of the whole batch."""
        count = self.count(place.batched)
        if count == 1:
            return number + place.start
        if not all(place.batched):
            index, stride, rest = 0, 1, 1
            for size, flag in reversed(list(zip(self.sizes, place.batched))):
                if flag:
                    index = index + member // rest % size * stride
                    stride *= size
                rest *= size
            member = index
        return member + (number * count + place.start)


class KernelLoop:
    """A loop as one kernel. `operands` are the traced arrays that its body closes over."""

    def __init__(
        self,
        scalar: ScalarFunction,
        carry: PyTree,
        tables: PyTree,
        num_outputs: int,
        launch: Launch,
        descending: bool = False,
    ):
        self.scalar, self.num_outputs, self.launch = scalar, num_outputs, launch
        self.carry, self.tables, self.descending = carry, tables, descending
        self.operands = scalar.operands

    def lower(self, platform: str) -> jax.stages.Lowered:
        """Lowers the kernel by itself, independent of what is being traced."""
        index = jax.ShapeDtypeStruct((), np.dtype("int32"))
        args = self.carry, index, self.tables, jtu.tree_map(_struct, self.operands)
        return jax.jit(self.run).trace(*args).lower(lowering_platforms=(platform,))

    def body(self, operands: list[Array]) -> LoopBody:
        """The body, with these operands in place of the arrays that it closes over."""

        def body(carry, x):
            outs = eval_jaxpr(self.scalar.closed.jaxpr, self.scalar.consts(operands), *jtu.tree_leaves((carry, x)))
            return jtu.tree_unflatten(jtu.tree_structure(self.scalar.structure), outs)

        return body

    @property
    def table_length(self) -> int:
        """The number of entries of the tables, zero if there are none."""
        return max((x.shape[0] for x in jtu.tree_leaves(self.tables)), default=0)

    @property
    def entry(self) -> PyTree:
        """An example of an entry of the tables."""
        return jtu.tree_map(lambda x: _struct(x, 1), self.tables)

    @property
    def _results(self) -> list[jax.ShapeDtypeStruct]:
        """The leaves of the carry at the end, and of all outputs."""
        outputs = jtu.tree_map(
            lambda x: jax.ShapeDtypeStruct((self.num_outputs, *x.shape), x.dtype), self.scalar.structure[1]
        )
        return jtu.tree_leaves((self.carry, outputs))

    def run(self, carry, index, tables, operands) -> tuple[PyTree, PyTree]:
        """`indexed_loop`. In a batch, each member has a thread of its own."""
        leaves = jtu.tree_leaves((index, carry, tables, operands))
        outs = self._in_threads((), ((),) * len(leaves))(*leaves)
        return jtu.tree_unflatten(jtu.tree_structure((self.carry, self.scalar.structure[1])), outs)

    def _in_threads(self, sizes: tuple[int, ...], batched: tuple[tuple[bool, ...], ...]) -> Callable:
        """The kernel on leaves with batch axes of these sizes, each leaf along some of them."""

        @jax.custom_batching.custom_vmap
        def run(*leaves):
            return self._launch(sizes, batched, leaves)

        @run.def_vmap
        def _(axis_size, in_batched, *leaves):
            now_batched = tuple((flag, *flags) for flag, flags in zip(in_batched, batched))
            outs = self._in_threads((axis_size, *sizes), now_batched)(*leaves)
            return outs, [True] * len(outs)

        return run

    def _launch(self, sizes, batched, leaves) -> list[Array]:
        layout, members = _Layout(sizes), math.prod(sizes)
        if members == 0:
            return [jnp.zeros((*sizes, *x.shape), x.dtype) for x in self._results]
        places = [layout.pack(jnp.asarray(x), flags) for x, flags in zip(leaves, batched)]
        operands, results = layout.operands(), self._results
        # Without room for outputs, the kernel has those of the carry alone, and stores no others.
        kept = results if self.num_outputs > 0 else results[: len(jtu.tree_leaves(self.carry))]
        outputs = [jax.ShapeDtypeStruct((x.size * members,), _stored(x.dtype)) for x in kept]
        found = self.launch(functools.partial(_Member, self, layout, places), operands, outputs, members, 1, "loop")
        wide = [
            jnp.moveaxis(x.reshape(*like.shape, *sizes), range(-len(sizes), 0), range(len(sizes)))
            for x, like in zip(found, kept)
        ]
        none = [jnp.zeros((*sizes, *x.shape), x.dtype) for x in results[len(kept) :]]
        return [x.astype(like.dtype) for x, like in zip(wide, kept)] + none


class _Member:
    """The loop of one member, as the program of one thread. Its numbers are in registers."""

    def __init__(self, loop: KernelLoop, layout: _Layout, places: list[_Place], threads, member, *arrays):
        self.loop, self.layout, self.threads, self.member = loop, layout, threads, member
        self.buffers, self.outputs = arrays[: len(layout.buffers)], arrays[len(layout.buffers) :]
        tree = jtu.tree_structure((0, loop.carry, loop.tables, loop.operands))
        index_at, carry_at, self.tables_at, operands_at = jtu.tree_unflatten(tree, places)
        # Few numbers are read once, others when they are used.
        few = sum(x.size for x in loop.operands) <= _MOST_IN_REGISTERS
        self.operands = [self.stored(place, like, few) for place, like in zip(operands_at, loop.operands)]
        index = self.read(index_at, jax.ShapeDtypeStruct((), np.dtype(np.int32))).item()
        start = self.state(index, self.read(carry_at, loop.carry), self.entry(threads.larger(self.as_index(index), 0)))
        more = lambda state: threads.compare("ge", state[0], threads.constant(np.int32(0)))
        end = threads.while_loop(more, self.advance, start)
        _, carry, _ = self.parts(end)
        self.write(self.outputs, carry)

    def advance(self, state: list) -> list:
        """One iteration."""
        index, carry, entry = self.parts(state)
        # Read one iteration ahead, which takes as long as many operations.
        here, threads = self.as_index(index), self.threads
        last = max(self.loop.table_length - 1, 0)
        following = self.entry(threads.larger(here - 1, 0) if self.loop.descending else threads.smaller(here + 1, last))
        consts = [x if x.dtype == object else as_scalars(x) for x in self.loop.scalar.consts(self.operands)]
        carry, output, slot, index = self.loop.scalar(carry, entry, consts=consts, apply=InBackend(self.threads))
        self.write(self.outputs[len(jtu.tree_leaves(carry)) :], output, self.as_index(slot.item()))
        return self.state(index.item(), carry, following)

    def state(self, index, carry: PyTree, entry: PyTree) -> list:
        """The numbers of an iteration: the index, the carry and an entry of the tables, in their dtypes."""
        likes = jtu.tree_leaves((self.loop.carry, self.loop.entry))
        pairs = [
            (number, like.dtype) for x, like in zip(jtu.tree_leaves((carry, entry)), likes) for number in x.ravel()
        ]
        return [self.as_number(index, np.int32), *(self.as_number(*pair) for pair in pairs)]

    def parts(self, state: list) -> tuple:
        """The index, the carry and the entry of the tables in a `state`."""
        index, *numbers = state
        arrays, (likes, tree) = [], jtu.tree_flatten((self.loop.carry, self.loop.entry))
        for like in likes:
            arrays.append(object_array(numbers[: like.size]).reshape(like.shape))
            numbers = numbers[like.size :]
        return (index, *jtu.tree_unflatten(tree, arrays))

    def entry(self, index) -> PyTree:
        """An entry of the tables."""
        return self.read(self.tables_at, self.loop.entry, index)

    def read(self, places: PyTree, likes: PyTree, index=0, constant: bool = True) -> PyTree:
        """Arrays like these, or those at an index of tables of such arrays. `constant`: they may be read early."""

        def array(like, place):
            numbers = []
            for k in range(like.size):
                address = self.layout.address(place, self.member, index * like.size + k)
                numbers += self.threads.load(self.buffers[place.buffer], address, constant=constant)
            return object_array([self.as_number(x, like.dtype) for x in numbers]).reshape(like.shape)

        return jtu.tree_map(array, likes, places)

    def stored(self, place: _Place, like, read: bool) -> np.ndarray:
        """An array in memory. If `read`, its numbers are in registers, except those that an index chooses."""
        known = self.read(place, like).ravel() if read else None

        def load(number: int, terms: list):
            if known is not None and not terms:
                return known[number]
            index = number
            for stride, i in terms:
                index = self.as_index(i) * stride + index
            # What is not chosen by an index could be read before the loop, which would take too many registers.
            address = self.layout.address(place, self.member, index)
            (value,) = self.threads.load(self.buffers[place.buffer], address, constant=bool(terms))
            return self.as_number(value, like.dtype)

        return object_array([Stored(load, k, like.dtype) for k in range(like.size)]).reshape(like.shape)

    def write(self, arrays, values: PyTree, index=0):
        """Writes values, or an entry of outputs of such values."""
        own = _Place(0, 0, (True,) * len(self.layout.sizes))
        for array, x in zip(arrays, jtu.tree_leaves(values)):
            for k, number in enumerate(x.ravel()):
                address = self.layout.address(own, self.member, index * x.size + k)
                self.threads.store(array, address, [self.as_number(number, array.dtype)])

    def as_index(self, x):
        return self.as_number(x, np.int64)

    def as_number(self, x, dtype):
        return as_number(self.threads, x, dtype)


def _struct(x, axis: int = 0) -> jax.ShapeDtypeStruct:
    """An array's shape from an axis on, and its dtype."""
    return jax.ShapeDtypeStruct(x.shape[axis:], x.dtype)


def _stored(dtype) -> np.dtype:
    """The dtype of numbers of another dtype in a buffer."""
    return np.dtype(np.int32) if dtype.kind == "b" else dtype


def build(
    body: LoopBody, carry, tables, num_outputs: int, max_cost: float, launch: Launch, descending: bool = False
) -> KernelLoop | None:
    """A loop as one kernel, if its operations and dtypes are supported, whatever the device."""
    carry, tables = jtu.tree_map(_struct, (carry, tables))
    scalar = scalarise(body, carry, jtu.tree_map(lambda x: _struct(x, 1), tables), max_cost=max_cost)
    if scalar is None or unsupported(scalar):
        return None
    if any(x.dtype not in DTYPES for x in jtu.tree_leaves((carry, tables, scalar.structure[:2]))):
        return None
    return KernelLoop(scalar, carry, tables, num_outputs, launch, descending)


def passes_common_test(launch: Launch) -> bool:
    """Whether loops with known results run on the default device, with the operations of most fields."""
    return all(_test_loop(launch, dtype, COMMON_FUNCTIONS) for dtype in _float_dtypes())


def passes_rare_test(launch: Launch) -> bool:
    """As `passes_common_test`, with the other functions, and with a loop in the loop."""
    rare = FUNCTIONS.keys() - COMMON_FUNCTIONS
    return all(_test_loop(launch, dtype, rare) and _test_inner_loop(launch, dtype) for dtype in _float_dtypes())


def _float_dtypes() -> list[np.dtype]:
    return [
        np.dtype(np.float32),
        *([np.dtype(np.float64)] if jax.dtypes.canonicalize_dtype(np.float64) == np.float64 else []),
    ]


# Within the domains of all functions.
_TEST_POINTS = (0.3, 0.7, 1.4)


def _test_loop(launch: Launch, dtype: np.dtype, names) -> bool:
    """A loop that evaluates functions at a few points, and adds them up, in a batch of three members."""
    names = sorted(names)
    table = np.array(_TEST_POINTS, dtype)
    arguments = {"acos": table / 2, "asin": table / 2, "atanh": table / 2, "acosh": table + 1}
    inputs = np.stack([arguments.get(name, table) for name in names], axis=1)

    def body(carry, x):
        total, k = carry
        values = jnp.stack([_in_jax(name)(x[j]) for j, name in enumerate(names)])
        total = jnp.where(k == 1, total - values, total + values)
        return (total, k + 1), values, k, jnp.where(k < len(table) - 1, k + 1, -1)

    # NumPy arrays and a compiled program: this runs while something else is being traced.
    carry = np.zeros(len(names), dtype), np.zeros((), np.int32)
    loop = build(body, carry, inputs, len(table), 1e4, launch)
    assert loop is not None
    starts = np.arange(3 * len(names)).reshape(3, -1).astype(dtype)
    args = (starts, carry[1]), np.zeros((), np.int32), inputs, []
    batch = jax.jit(jax.vmap(loop.run, ((0, None), None, None, None)))
    (total, count), outputs = batch.trace(*args).lower(lowering_platforms=(platform(),)).compile()(*args)
    want = np.stack([_in_numpy(name)(inputs[:, j]) for j, name in enumerate(names)], axis=1)
    close = functools.partial(np.allclose, rtol=0, atol=300 * np.finfo(dtype).eps)
    sums = starts + (want[0] - want[1] + want[2])[None]
    return bool(close(outputs, want[None]) and close(total, sums) and np.all(np.asarray(count) == len(table)))


def _test_inner_loop(launch: Launch, dtype: np.dtype) -> bool:
    """A loop in which each member halves its number until that is small, and then multiplies it by seven."""

    def body(carry, _):
        y, k = carry
        halve = lambda state: (state[0] / 2, state[1] + 1, state[0] > 4)
        y, halvings, _ = lax.while_loop(lambda state: state[2], halve, (y, jnp.zeros((), jnp.int32), y > 2))
        return (7 * y, k + 1), halvings, k, jnp.where(k < 2, k + 1, -1)

    carry = np.zeros((), dtype), np.zeros((), np.int32)
    loop = build(body, carry, (), 3, 1e4, launch)
    assert loop is not None
    starts = np.array([1.0, 5.0, 40.0], dtype)
    args = (starts, carry[1]), np.zeros((), np.int32), (), []
    batch = jax.jit(jax.vmap(loop.run, ((0, None), None, None, None)))
    (ends, _), halvings = batch.trace(*args).lower(lowering_platforms=(platform(),)).compile()(*args)
    want = np.array([[0, 2, 3], [2, 3, 2], [5, 3, 2]])
    return np.array_equal(halvings, want) and np.array_equal(ends, starts * 343 / 2.0 ** want.sum(axis=1))


def _in_numpy(name: str) -> Callable:
    """A function of one argument in NumPy. Functions of two are given the argument and its half."""
    function = FUNCTIONS[name]
    return (lambda x: function(x, x / 2)) if name in ("atan2", "pow") else function


def _in_jax(name: str) -> Callable:
    if name.startswith("round"):
        method = lax.RoundingMethod.TO_NEAREST_EVEN if name == "round_even" else lax.RoundingMethod.AWAY_FROM_ZERO
        return lambda x: lax.round(x, method)
    function = getattr(lax, name)
    return (lambda x: function(x, x / 2)) if name in ("atan2", "pow") else function
