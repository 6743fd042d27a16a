"""A whole loop of few numbers in one kernel of a GPU.

XLA launches the kernels of a loop's body again at every turn, about a microsecond each, and looks from the host whether
the loop goes on, 15 microseconds each. Written with Pallas (Mosaic GPU, part of JAX), the loop is one kernel, in whose
threads all do the same: they hold all numbers in registers.

What cannot be had so (no such GPU, an operation that Mosaic does not know) is told before anything depends on it: the device
runs a loop of known outcome at the first use, and a kernel with an operation that is not known for sure is lowered once on
its own.
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

from .._scan import device_passes
from ._scalar import as_objects, ScalarFunction, scalarise


_DTYPES = frozenset(map(np.dtype, (np.float32, np.float64, np.int32, np.int64)))

# Operations that Mosaic lowers for sure (`tests/test_sequential.py` tries each), as `ScalarFunction.operations` calls them;
# with any other, a kernel is lowered once by itself to find out.
KNOWN = frozenset(
    """abs add cos div eq exp ge gt le log lt max min mul ne neg sin square sub tanh
    add[i] eq[i] ge[i] gt[i] le[i] lt[i] max[i] min[i] mul[i] ne[i] sub[i]
    and[b] or[b] select_n[b] select_n[bi]
    convert_element_type convert_element_type[b] convert_element_type[bi] convert_element_type[i]""".split()
)


def _integer_power(x, y):
    """`x**y`, by products; Mosaic knows no negative exponents."""
    if y == 0:
        return np.ones((), x.dtype)[()]
    value = x
    # The binary digits after the first.
    for digit in bin(abs(y))[3:]:
        value = value * value * x if digit == "1" else value * value
    return 1 / value if y < 0 else value


def _power(x, exponent):
    """`x**exponent`, by roots and products for multiples of one half; of others Mosaic knows nothing."""
    twice = 2 * exponent if isinstance(exponent, np.floating) else np.nan
    if not (abs(twice) <= _LARGEST_TWICE_POWER and twice == np.round(twice)):
        return lax.pow(x, exponent)
    whole, half = divmod(int(abs(twice)), 2)
    value = _integer_power(x, whole)
    value = (lax.sqrt(x) * value if whole > 0 else lax.sqrt(x)) if half else value
    return 1 / value if twice < 0 else value


_LARGEST_TWICE_POWER = 16

# Operations that Mosaic does not know, or not in all cases, by those that it does, to rounding.
_RULES: dict[str, Callable] = {
    "add_any": lambda x, y: x + y,
    "is_finite": lambda x: jnp.abs(x) < np.inf,
    "logistic": lambda x, **_: 1 / (1 + jnp.exp(-x)),
    "stop_gradient": lambda x: x,
    "copy": lambda x: x,
    "integer_pow": _integer_power,
    "pow": _power,
}
# Some versions of Mosaic do not know roots.
_UNSURE = {"pow"}

# In larger batches the threads of a kernel, which all do the same, are better used by XLA: one a member.
_LARGEST_BATCH = 512

Turn = Callable[[PyTree, PyTree], tuple[PyTree, PyTree, Int[Array, ""], Int[Array, ""]]]


def kernel_loop(turn: Turn, carry: PyTree, tables: PyTree, num_rows: int, max_cost: float) -> "KernelLoop | None":
    """A loop as one kernel.

        while index >= 0:
            carry, row, place, index = turn(carry, tables[index])
            rows[place] = row

    **Arguments:**

    - `turn`: as above, in small arrays; without tangents. `place` must be in `0 .. num_rows - 1`, and `index` within the
        tables or negative.
    - `carry`, `tables`: examples of what the loop is given; the leaves of `tables` have a leading axis.
    - `num_rows`: the length of `rows`.
    - `max_cost`: the largest number of scalar operations of a turn that is worth it.

    **Returns:** a `KernelLoop`. `None` if it cannot be had.
    """
    if not kernels_work():
        return None
    loop = _build(turn, carry, tables, num_rows, max_cost)
    if loop is None:
        return None
    if loop.scalar.operations <= KNOWN | _RULES.keys() - _UNSURE:
        return loop
    try:
        loop.lower()
    except Exception:  # of any kind: what Mosaic cannot lower it says in many ways
        return None
    return loop


class _Packing(NamedTuple):
    """Where the numbers of a pytree stand in one vector for each dtype.

    (XLA hands a kernel slices of other arrays as they are, and Mosaic refuses what is not aligned to 256 bytes. A
    concatenation is an array of its own. It always has a number more than is needed, so that it is one.)
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

    def read(self, refs, row=None) -> PyTree:
        """All numbers, or those of one row of every leaf."""
        refs = dict(zip(self.dtypes, refs))
        leaves, tree = jtu.tree_flatten(self.structure)
        return jtu.tree_unflatten(tree, [self._leaf(refs, x, at, row) for x, at in zip(leaves, self.places)])

    def _leaf(self, refs, x, at, row):
        dtype, start = at
        shape = x.shape if row is None else x.shape[1:]
        size = math.prod(shape)
        begin = start if row is None else start + row * size
        return as_objects([refs[dtype][begin + k] for k in range(size)]).reshape(shape)


class KernelLoop:
    """A loop as one kernel.

    **Attributes:** `closed`, the turn, as a function of the leaves of a carry and of a row of the tables; `operands`, the
    traced arrays that it closes over.
    """

    def __init__(self, scalar: ScalarFunction, carry: PyTree, tables: PyTree, num_rows: int, interpret):
        self.scalar, self.num_rows, self.interpret = scalar, num_rows, interpret
        self.carry, self.tables = carry, tables
        self.closed = scalar.closed
        self.operands = [const for const in self.closed.consts if isinstance(const, Tracer)]

    def lower(self) -> jax.stages.Lowered:
        """By itself, for a GPU, whatever is being traced."""
        index = jax.ShapeDtypeStruct((), np.dtype("int32"))
        args = self.carry, index, self.tables, jtu.tree_map(_struct, self.operands)
        return jax.jit(self.run).trace(*args).lower(lowering_platforms=("cuda",))

    def turn(self, operands: list[Array]) -> Turn:
        """The turn, with these operands."""
        given = iter(operands)
        consts = [next(given) if isinstance(const, Tracer) else const for const in self.closed.consts]

        def turn(carry, x):
            outs = eval_jaxpr(self.closed.jaxpr, consts, *jtu.tree_leaves((carry, x)))
            return jtu.tree_unflatten(jtu.tree_structure(self.scalar.structure), outs)

        return turn

    def run(self, carry, index, tables, operands) -> tuple[PyTree, PyTree]:
        """The carry at the end, and the rows; those that were not written are arbitrary. In a batch, each member has its own
        block of threads."""
        # Imported where it is needed: a part of JAX that is large, and for some GPUs only.
        from jax.experimental.pallas import mosaic_gpu as mosaic

        parts = [_Packing.of(jtu.tree_map(_struct, part)) for part in ((index, carry), tables, operands)]
        inputs = [part.pack(tree) for part, tree in zip(parts, ((index, carry), tables, operands))]
        flat_inputs, inputs_tree = jtu.tree_flatten(inputs)
        row = self.scalar.structure[1]
        outs = self.carry, jtu.tree_map(lambda x: jax.ShapeDtypeStruct((self.num_rows, *x.shape), x.dtype), row)
        flat_outs, outs_tree = jtu.tree_flatten(outs)

        def body(*refs):
            in_refs = jtu.tree_unflatten(inputs_tree, refs[: len(flat_inputs)])
            self._body(parts, in_refs, jtu.tree_unflatten(outs_tree, refs[len(flat_inputs) :]))

        out_type = tuple(jax.ShapeDtypeStruct((x.size,), x.dtype) for x in flat_outs)
        found = mosaic.kernel(body, out_type=out_type, interpret=self.interpret)(*flat_inputs)
        return jtu.tree_unflatten(outs_tree, [x.reshape(like.shape) for x, like in zip(found, flat_outs)])

    def _body(self, parts: list[_Packing], in_refs, out_refs):
        start, tables, operands = parts
        start_refs, table_refs, operand_refs = in_refs
        carry_refs, row_refs = out_refs
        first, carry = start.read(start_refs)
        carry_leaves, carry_tree = jtu.tree_flatten(carry)

        def as_state(index, carry):
            leaves = zip(jtu.tree_leaves(carry), jtu.tree_leaves(self.carry))
            numbers = [_cast(number, like.dtype) for x, like in leaves for number in x.ravel()]
            return _cast(index.item(), np.int32), tuple(numbers)

        def as_carry(numbers):
            bounds = np.cumsum([0, *(x.size for x in carry_leaves)])
            leaves = [as_objects(numbers[a:b]).reshape(x.shape) for a, b, x in zip(bounds, bounds[1:], carry_leaves)]
            return jtu.tree_unflatten(carry_tree, leaves)

        def go(state):
            index, numbers = state
            # Read again at every turn, which hides behind the arithmetic: too many for the registers otherwise.
            traced = iter(operands.read(operand_refs))
            consts = [next(traced) if isinstance(x, Tracer) else _as_numbers(x) for x in self.scalar.closed.consts]
            x = tables.read(table_refs, index)
            carry, row, place, index = self.scalar(as_carry(numbers), x, consts=consts, rules=_RULES)
            _write(row_refs, row, _cast(place.item(), np.int32))
            return as_state(index, carry)

        _, numbers = lax.while_loop(lambda state: state[0] >= 0, go, as_state(first, carry))
        _write(carry_refs, as_carry(numbers), np.int32(0))


def in_batches(kernel: Callable, otherwise: Callable, size: int = 1) -> Callable:
    """`kernel`, and in large batches `otherwise`, of the same arguments. Neither may close over traced arrays."""

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


def _write(refs: PyTree, values: PyTree, row):
    for ref, x in zip(jtu.tree_leaves(refs), jtu.tree_leaves(values)):
        for k, number in enumerate(x.ravel()):
            ref[row * x.size + k] = number


def _cast(number, dtype):
    return lax.convert_element_type(number, np.dtype(dtype))


def _struct(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _as_numbers(x) -> np.ndarray:
    """A known array as an object array of NumPy's scalars."""
    x = np.asarray(x)
    return as_objects(list(x.ravel())).reshape(x.shape)


def _build(turn: Turn, carry, tables, num_rows: int, max_cost: float, interpret=None) -> KernelLoop | None:
    carry, tables = jtu.tree_map(_struct, (carry, tables))
    row = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tables)
    scalar = scalarise(turn, carry, row, max_cost=max_cost)
    if scalar is None:
        return None
    used = carry, tables, scalar.structure[:2], scalar.closed.consts
    if any(x.dtype not in _DTYPES for x in jtu.tree_leaves(used)):
        return None
    return KernelLoop(scalar, carry, tables, num_rows, interpret)


@functools.lru_cache(maxsize=1)
def kernels_work() -> bool:
    """Whether the default device runs such loops, found out by running one."""
    return device_passes(_self_test)


def _self_test() -> bool:
    """A loop of five turns in float32, whose result is known."""

    def turn(carry, x):
        carry = {"sum": carry["sum"] + x * carry["factor"], "factor": -carry["factor"], "k": carry["k"] + 1}
        return carry, carry["sum"], carry["k"] - 1, jnp.where(carry["k"] < 5, carry["k"], -1)

    # NumPy's arrays, and a program that is called and not traced: all this happens while something else is traced.
    carry = {"sum": np.zeros(2, np.float32), "factor": np.ones((), np.float32), "k": np.zeros((), np.int32)}
    table = np.array([[1, 2], [3, 5], [8, 13], [21, 34], [55, 89]], np.float32)
    loop = _build(turn, carry, table, 5, 1e3)
    assert loop is not None
    end, rows = loop.lower().compile()(carry, np.zeros((), np.int32), table, [])
    want = np.cumsum(table * np.array([1, -1, 1, -1, 1], np.float32)[:, None], axis=0)
    return bool(np.array_equal(rows, want) and np.array_equal(end["sum"], want[-1]) and int(end["k"]) == 5)
