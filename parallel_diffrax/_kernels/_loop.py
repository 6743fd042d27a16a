"""A loop over few numbers as a single GPU kernel.

XLA launches the kernels of a loop's body anew in every iteration, about a microsecond each, and the host checks whether the
loop continues, 15 microseconds each. Written with Pallas (its Mosaic GPU backend, a part of JAX), the loop is one kernel.
All of its threads do the same work, with all numbers in registers.

Unsupported cases are detected up front: a loop with a known result is run once on the device, and a kernel with an operation
that may be unsupported is lowered once by itself.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import eval_jaxpr, Tracer
from jaxtyping import Array, Int, PyTree

from ._probe import device_supports_kernels, on_cpu
from ._scalarise import as_scalars, object_array, ScalarFunction, scalarise


_DTYPES = frozenset(map(np.dtype, (np.float32, np.float64, np.int32, np.int64)))

# Operations that Mosaic is known to lower (`tests/test_stepper.py` tries each), named as by `ScalarFunction.operations`. A
# kernel with any other is lowered once by itself to find out.
KNOWN = frozenset(
    """abs add cos div eq exp ge gt le log lt max min mul ne neg sin square sub tanh
    add[i] eq[i] ge[i] gt[i] le[i] lt[i] max[i] min[i] mul[i] ne[i] sub[i]
    and[b] or[b] select_n[b] select_n[bi]
    convert_element_type convert_element_type[b] convert_element_type[bi] convert_element_type[i]""".split()
)

# Bodies with more scalar operations than this are left to XLA.
_MAX_COST = 8000.0


def _integer_power(x, y):
    """`x**y` by repeated products: Mosaic supports no negative exponents."""
    if y == 0:
        return np.ones((), x.dtype)[()]
    value = x
    # The binary digits after the first.
    for digit in bin(abs(y))[3:]:
        value = value * value * x if digit == "1" else value * value
    return 1 / value if y < 0 else value


def _power(x, exponent):
    """`x**exponent` by roots and products if twice the exponent is an integer. Mosaic supports no other powers."""
    twice = 2 * exponent if isinstance(exponent, np.floating) else np.nan
    if not (abs(twice) <= _LARGEST_TWICE_POWER and twice == np.round(twice)):
        return lax.pow(x, exponent)
    whole, half = divmod(int(abs(twice)), 2)
    value = _integer_power(x, whole)
    value = (lax.sqrt(x) * value if whole > 0 else lax.sqrt(x)) if half else value
    return 1 / value if twice < 0 else value


_LARGEST_TWICE_POWER = 16

# Operations that Mosaic does not support, or not in all cases, expressed by those that it does. Equal up to rounding.
_RULES: dict[str, Callable] = {
    "add_any": lambda x, y: x + y,
    "is_finite": lambda x: jnp.abs(x) < np.inf,
    "logistic": lambda x, **_: 1 / (1 + jnp.exp(-x)),
    "stop_gradient": lambda x: x,
    "copy": lambda x: x,
    "integer_pow": _integer_power,
    "pow": _power,
}
# Some versions of Mosaic do not support square roots.
_UNSURE = {"pow"}

# All threads of a kernel do the same work. XLA uses them better in larger batches: one thread per member.
_LARGEST_BATCH = 512

LoopBody = Callable[[PyTree, PyTree], tuple[PyTree, PyTree, Int[Array, ""], Int[Array, ""]]]


def indexed_loop(
    body: LoopBody, carry: PyTree, index: Int[Array, ""], tables: PyTree, num_outputs: int
) -> tuple[PyTree, PyTree]:
    """A loop of unknown length that writes one output per iteration:

        while index >= 0:
            carry, output, slot, index = body(carry, tables[index])
            outputs[slot] = output

    Returns `carry` at the end and `outputs`, whose unwritten entries are arbitrary. Arrays are small and have no tangents.
    `slot` must be in `0 .. num_outputs - 1`, and `index` within the tables or negative.

    One kernel where the device supports it. Otherwise XLA's loop, with a body in scalars on devices that launch kernels.
    """
    in_arrays = lambda carry, index, tables: loop_in_arrays(body, carry, index, tables, num_outputs)
    if on_cpu():
        return in_arrays(carry, index, tables)
    kernel = kernel_loop(body, carry, tables, num_outputs, _MAX_COST)
    if kernel is not None:

        def otherwise(carry, index, tables, operands):
            return loop_in_arrays(kernel.body(operands), carry, index, tables, num_outputs)

        in_kernel = in_batches(kernel.run, otherwise)
        cuda = lambda carry, index, tables: in_kernel(carry, index.astype(jnp.int32), tables, kernel.operands)
        return lax.platform_dependent(carry, index, tables, cpu=in_arrays, cuda=cuda, default=in_arrays)
    fast = _in_scalars(body, carry, jtu.tree_map(lambda x: x[0], tables))
    in_scalars = lambda carry, index, tables: loop_in_arrays(fast, carry, index, tables, num_outputs)
    return lax.platform_dependent(carry, index, tables, cpu=in_arrays, default=in_scalars)


def loop_in_arrays(body: LoopBody, carry, index, tables, num_outputs: int) -> tuple[PyTree, PyTree]:
    """`indexed_loop` as a loop of XLA's."""
    _, output, *_ = jax.eval_shape(body, carry, jtu.tree_map(lambda x: x[0], tables))
    outputs = jtu.tree_map(lambda x: jnp.zeros((num_outputs, *x.shape), x.dtype), output)

    def advance(state):
        carry, outputs, index = state
        carry, output, slot, index = body(carry, jtu.tree_map(lambda x: x[index], tables))
        outputs = jtu.tree_map(lambda x, new: lax.dynamic_update_index_in_dim(x, new, slot, 0), outputs, output)
        return carry, outputs, index.astype(jnp.int32)

    carry, outputs, _ = lax.while_loop(lambda state: state[2] >= 0, advance, (carry, outputs, index.astype(jnp.int32)))
    return carry, outputs


def _in_scalars(fn: Callable, *examples: PyTree) -> Callable:
    """`fn` in scalars, with arrays as arguments and results; `fn` itself if it cannot be rewritten."""
    scalar = scalarise(fn, *examples, max_cost=_MAX_COST)
    if scalar is None:
        return fn

    def in_scalars(*args):
        outs = scalar(*jtu.tree_map(as_scalars, args))
        return jtu.tree_map(lambda x, like: jnp.stack(list(x.ravel())).reshape(like.shape), outs, scalar.structure)

    return in_scalars


def kernel_loop(
    body: LoopBody, carry: PyTree, tables: PyTree, num_outputs: int, max_cost: float
) -> "KernelLoop | None":
    """An `indexed_loop` as one kernel, from an example of its arguments. `None` if the device or the kernel compiler does
    not support it, or if an iteration has more than `max_cost` scalar operations, for which a kernel does not pay."""
    if not loop_kernels_work():
        return None
    loop = _build(body, carry, tables, num_outputs, max_cost)
    if loop is None:
        return None
    if loop.scalar.operations <= KNOWN | _RULES.keys() - _UNSURE:
        return loop
    try:
        loop.lower()
    except Exception:  # of any kind: Mosaic reports what it cannot lower in many ways
        return None
    return loop


class _Packing(NamedTuple):
    """Where the numbers of a pytree are stored in one vector per dtype.

    (XLA passes slices of other arrays to a kernel without a copy, and Mosaic refuses operands that are not aligned to 256
    bytes. A concatenation is an array of its own. One extra number makes sure that there is a concatenation.)
    """

    structure: PyTree
    places: list[tuple[np.dtype, int]]

    @classmethod
    def of(cls, structure: PyTree) -> "_Packing":
        sizes, places = {}, []
        for x in jtu.tree_leaves(structure):
            places.append((np.dtype(x.dtype), sizes.get(x.dtype, 0)))
            sizes[x.dtype] = sizes.get(x.dtype, 0) + x.size
        return cls(structure, places)

    @property
    def dtypes(self) -> list[np.dtype]:
        return list(dict.fromkeys(dtype for dtype, _ in self.places))

    def pack(self, tree: PyTree) -> list[Array]:
        leaves = [jnp.reshape(x, -1) for x in jtu.tree_leaves(tree)]
        return [
            jnp.concatenate([*(x for x, (of, _) in zip(leaves, self.places) if of == dtype), jnp.zeros(1, dtype)])
            for dtype in self.dtypes
        ]

    def read(self, refs, index=None) -> PyTree:
        """All numbers, or the numbers of one entry of every leaf."""
        refs = dict(zip(self.dtypes, refs))
        leaves, tree = jtu.tree_flatten(self.structure)
        return jtu.tree_unflatten(tree, [self._leaf(refs, x, at, index) for x, at in zip(leaves, self.places)])

    def _leaf(self, refs, x, at, index):
        dtype, start = at
        shape = x.shape if index is None else x.shape[1:]
        size = math.prod(shape)
        start = start if index is None else start + index * size
        return object_array([refs[dtype][start + k] for k in range(size)]).reshape(shape)


class KernelLoop:
    """A loop as one kernel. `closed` is the body as a jaxpr in the leaves of a carry and of an entry of the tables;
    `operands` are the traced arrays that it closes over."""

    def __init__(self, scalar: ScalarFunction, carry: PyTree, tables: PyTree, num_outputs: int, interpret):
        self.scalar, self.num_outputs, self.interpret = scalar, num_outputs, interpret
        self.carry, self.tables = carry, tables
        self.closed = scalar.closed
        self.operands = [const for const in self.closed.consts if isinstance(const, Tracer)]

    def lower(self) -> jax.stages.Lowered:
        """Lowers the kernel by itself for a GPU, independent of what is being traced."""
        index = jax.ShapeDtypeStruct((), np.dtype("int32"))
        args = self.carry, index, self.tables, jtu.tree_map(_struct, self.operands)
        return jax.jit(self.run).trace(*args).lower(lowering_platforms=("cuda",))

    def body(self, operands: list[Array]) -> LoopBody:
        """The body, with these operands in place of the arrays that it closes over."""
        given = iter(operands)
        consts = [next(given) if isinstance(const, Tracer) else const for const in self.closed.consts]

        def body(carry, x):
            outs = eval_jaxpr(self.closed.jaxpr, consts, *jtu.tree_leaves((carry, x)))
            return jtu.tree_unflatten(jtu.tree_structure(self.scalar.structure), outs)

        return body

    def run(self, carry, index, tables, operands) -> tuple[PyTree, PyTree]:
        """`indexed_loop`. In a batch, each member has a block of threads of its own."""
        # Imported on demand: a large part of JAX, for some GPUs only.
        from jax.experimental.pallas import mosaic_gpu as mosaic

        parts = [_Packing.of(jtu.tree_map(_struct, part)) for part in ((index, carry), tables, operands)]
        inputs = [part.pack(tree) for part, tree in zip(parts, ((index, carry), tables, operands))]
        flat_inputs, inputs_tree = jtu.tree_flatten(inputs)
        output = self.scalar.structure[1]
        outs = self.carry, jtu.tree_map(lambda x: jax.ShapeDtypeStruct((self.num_outputs, *x.shape), x.dtype), output)
        flat_outs, outs_tree = jtu.tree_flatten(outs)

        def kernel(*refs):
            in_refs = jtu.tree_unflatten(inputs_tree, refs[: len(flat_inputs)])
            self._kernel(parts, in_refs, jtu.tree_unflatten(outs_tree, refs[len(flat_inputs) :]))

        out_type = tuple(jax.ShapeDtypeStruct((x.size,), x.dtype) for x in flat_outs)
        found = mosaic.kernel(kernel, out_type=out_type, interpret=self.interpret)(*flat_inputs)
        return jtu.tree_unflatten(outs_tree, [x.reshape(like.shape) for x, like in zip(found, flat_outs)])

    def _kernel(self, parts: list[_Packing], in_refs, out_refs):
        start, tables, operands = parts
        start_refs, table_refs, operand_refs = in_refs
        carry_refs, output_refs = out_refs
        first, carry = start.read(start_refs)
        carry_leaves, carry_tree = jtu.tree_flatten(carry)

        def as_state(index, carry):
            leaves = zip(jtu.tree_leaves(carry), jtu.tree_leaves(self.carry))
            numbers = [_cast(number, like.dtype) for x, like in leaves for number in x.ravel()]
            return _cast(index.item(), np.int32), tuple(numbers)

        def as_carry(numbers):
            bounds = np.cumsum([0, *(x.size for x in carry_leaves)])
            leaves = [object_array(numbers[a:b]).reshape(x.shape) for a, b, x in zip(bounds, bounds[1:], carry_leaves)]
            return jtu.tree_unflatten(carry_tree, leaves)

        def advance(state):
            index, numbers = state
            # Read again in every iteration, which the arithmetic hides: there are too many to keep in registers.
            traced = iter(operands.read(operand_refs))
            consts = [next(traced) if isinstance(x, Tracer) else _as_numbers(x) for x in self.scalar.closed.consts]
            x = tables.read(table_refs, index)
            carry, output, slot, index = self.scalar(as_carry(numbers), x, consts=consts, rules=_RULES)
            _write(output_refs, output, _cast(slot.item(), np.int32))
            return as_state(index, carry)

        _, numbers = lax.while_loop(lambda state: state[0] >= 0, advance, as_state(first, carry))
        _write(carry_refs, as_carry(numbers), np.int32(0))


def in_batches(kernel: Callable, otherwise: Callable, size: int = 1) -> Callable:
    """`kernel`; in large batches `otherwise`, with the same arguments. Neither may close over traced arrays."""

    @jax.custom_batching.custom_vmap
    def run(*args):
        return kernel(*args)

    @run.def_vmap
    def _(axis_size, in_batched, *args):
        axes = tuple(jtu.tree_map(lambda batched: 0 if batched else None, in_batched))
        wide_kernel, wide = (jax.vmap(fn, in_axes=axes, axis_size=axis_size) for fn in (kernel, otherwise))
        total = size * axis_size
        outs = wide(*args) if total > _LARGEST_BATCH else in_batches(wide_kernel, wide, total)(*args)
        return outs, jtu.tree_map(lambda _: True, outs)

    return run


def _write(refs: PyTree, values: PyTree, slot):
    for ref, x in zip(jtu.tree_leaves(refs), jtu.tree_leaves(values)):
        for k, number in enumerate(x.ravel()):
            ref[slot * x.size + k] = number


def _cast(number, dtype):
    return lax.convert_element_type(number, np.dtype(dtype))


def _struct(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _as_numbers(x) -> np.ndarray:
    """A known array as an object array of NumPy scalars."""
    x = np.asarray(x)
    return object_array(list(x.ravel())).reshape(x.shape)


def _build(body: LoopBody, carry, tables, num_outputs: int, max_cost: float, interpret=None) -> KernelLoop | None:
    carry, tables = jtu.tree_map(_struct, (carry, tables))
    entry = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tables)
    scalar = scalarise(body, carry, entry, max_cost=max_cost)
    if scalar is None:
        return None
    used = carry, tables, scalar.structure[:2], scalar.closed.consts
    if any(x.dtype not in _DTYPES for x in jtu.tree_leaves(used)):
        return None
    return KernelLoop(scalar, carry, tables, num_outputs, interpret)


@functools.lru_cache(maxsize=1)
def loop_kernels_work() -> bool:
    """Whether the default device runs such loops. Runs one to find out."""
    return device_supports_kernels(_self_test)


def _self_test() -> bool:
    """A loop of five iterations in float32 with a known result."""

    def body(carry, x):
        carry = {"sum": carry["sum"] + x * carry["factor"], "factor": -carry["factor"], "k": carry["k"] + 1}
        return carry, carry["sum"], carry["k"] - 1, jnp.where(carry["k"] < 5, carry["k"], -1)

    # NumPy arrays and a compiled program: this runs while something else is being traced.
    carry = {"sum": np.zeros(2, np.float32), "factor": np.ones((), np.float32), "k": np.zeros((), np.int32)}
    table = np.array([[1, 2], [3, 5], [8, 13], [21, 34], [55, 89]], np.float32)
    loop = _build(body, carry, table, 5, 1e3)
    assert loop is not None
    end, outputs = loop.lower().compile()(carry, np.zeros((), np.int32), table, [])
    want = np.cumsum(table * np.array([1, -1, 1, -1, 1], np.float32)[:, None], axis=0)
    return bool(np.array_equal(outputs, want) and np.array_equal(end["sum"], want[-1]) and int(end["k"]) == 5)
