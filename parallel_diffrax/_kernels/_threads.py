"""GPU kernels written thread by thread.

A program is a Python function for one thread. `launch` traces it once, with symbolic values of the thread, into MLIR inside
a kernel of Pallas' Mosaic GPU (both are parts of JAX). Loops have a known length, there are no branches, and adjacent
threads can exchange numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.lax as lax
import numpy as np
from jaxtyping import Array


_WARP = 32
_BLOCK = 128
# Up to this many threads, each warp has a block of its own, which spreads the warps over the whole GPU.
_FEW_THREADS = 2**14
# The largest number of bytes that a thread reads or writes at once.
_WIDEST_ACCESS = 16
# MLIR's mark for an index that is not a constant.
_DYNAMIC = -(2**31)

# A floating-point number, or an index, of a thread.
Number = Any
Index = Any


def launch(
    program: Callable,
    operands: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    num_threads: int,
    group: int,
    name: str,
) -> list[Array]:
    """Runs `program(threads, index, *arrays)` in `num_threads` threads, and returns the outputs. `arrays` are handles of the
    operands and outputs, flattened, of float32 or float64.

    `group`, a divisor of `num_threads`, is the number of adjacent threads that work together. If they exchange numbers, it
    is a power of two, at most 32. Additional threads may repeat the work of others. `name` appears in profilers.
    """
    # Imported on demand: a large part of JAX, for some GPUs only.
    from jax.experimental.pallas import mosaic_gpu as mosaic

    threads_per_block = _WARP if num_threads <= _FEW_THREADS else _BLOCK
    dtypes = [np.dtype(x.dtype) for x in (*operands, *outputs)]

    def body(*refs):
        @mosaic.inline_mgpu(arg_types=tuple(mosaic.RefType() for _ in refs))
        def inline(ctx, *refs):
            del ctx
            Threads().run(program, refs, dtypes, num_threads, group, threads_per_block)

        inline(*refs)

    body.__name__ = name
    num_blocks = -(-num_threads // threads_per_block)
    flat = tuple(jax.ShapeDtypeStruct((math.prod(x.shape),), x.dtype) for x in outputs)
    # A thread waits only for threads with which it exchanges numbers.
    params = mosaic.CompilerParams(unsafe_no_auto_barriers=True)
    kernel = mosaic.kernel(body, out_type=flat, grid=(num_blocks,), grid_names=("block",), compiler_params=params)
    # Without the barrier, XLA would pass a slice of another array without a copy if it begins at a multiple of 128 bytes.
    # Mosaic requires 256.
    found = kernel(*lax.optimization_barrier([x.reshape(-1) for x in operands]))
    return [x.reshape(like.shape) for x, like in zip(found, outputs)]


@dataclasses.dataclass
class _Pointer:
    address: Any
    dtype: np.dtype


class Threads:
    """The operations of a thread. Indices also support `+ - * // %` and `<`, numbers `+` and `*`."""

    def __init__(self):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, gpu, llvm, math as mlir_math, memref, scf

        self.ir, self.arith, self.gpu, self.llvm, self.math = ir, arith, gpu, llvm, mlir_math
        self.memref, self.scf = memref, scf
        self.index_type = ir.IntegerType.get_signless(64)
        self.lane_type = ir.IntegerType.get_signless(32)

    def run(self, program, refs, dtypes, num_threads: int, group: int, threads_per_block: int):
        """Traces a program for a one-dimensional grid of blocks."""
        within = self._index(self.gpu.thread_id(self.gpu.Dimension.x))
        index = self._index(self.gpu.block_id(self.gpu.Dimension.x)) * threads_per_block + within
        if num_threads % threads_per_block != 0:
            # Additional threads repeat the last group.
            index = self.select(index < num_threads, index, index % group + (num_threads - group))
        arrays = [self._pointer(ref, dtype) for ref, dtype in zip(refs, dtypes)]
        if threads_per_block == _BLOCK:
            program(self, index, *arrays)
            return
        # Mosaic's blocks have four warps. The ones that are not needed end here.
        condition = self.scf.IfOp((within < threads_per_block).value)
        with self.ir.InsertionPoint(condition.then_block):
            program(self, index, *arrays)
            self.scf.YieldOp([])

    def load(self, array, start: Index, count: int) -> list[Number]:
        """Reads `count` numbers from index `start` on, which must be a multiple of `count`."""
        dtype, numbers = self._float_type(array.dtype), []
        width = _access_width(array.dtype, count)
        for k in range(0, count, width):
            address, alignment = self._address(array, start + k), width * array.dtype.itemsize
            if width == 1:
                numbers.append(_Number(self, self.llvm.load(dtype, address, alignment=alignment)))
                continue
            vector = self.llvm.load(self.ir.VectorType.get((width,), dtype), address, alignment=alignment)
            elements = (self.llvm.extractelement(vector, self._constant(j)) for j in range(width))
            numbers.extend(_Number(self, x) for x in elements)
        return numbers

    def store(self, array, start: Index, numbers: Sequence[Number]):
        """Writes numbers from index `start` on, which must be a multiple of their count."""
        dtype, width = self._float_type(array.dtype), _access_width(array.dtype, len(numbers))
        for k in range(0, len(numbers), width):
            address, alignment = self._address(array, start + k), width * array.dtype.itemsize
            value = numbers[k].value
            if width > 1:
                value = self.llvm.mlir_undef(self.ir.VectorType.get((width,), dtype))
                for j in range(width):
                    value = self.llvm.insertelement(value, numbers[k + j].value, self._constant(j))
            self.llvm.store(value, address, alignment=alignment)

    def multiply_add(self, a: Number, b: Number, c: Number) -> Number:
        """`a b + c`, rounded once."""
        return _Number(self, self.math.fma(a.value, b.value, c.value))

    def loop(self, count: int, body: Callable, carry: Sequence[Number]) -> list[Number]:
        """`carry = body(k, carry)` for `k = 0 .. count - 1`."""
        bounds = (self._constant(k) for k in (0, count, 1))
        loop = self.scf.ForOp(*bounds, [x.value for x in carry])
        with self.ir.InsertionPoint(loop.body):
            carry = body(_Index(self, loop.induction_variable), [_Number(self, x) for x in loop.inner_iter_args])
            self.scf.YieldOp([x.value for x in carry])
        return [_Number(self, x) for x in loop.results]

    def select(self, condition, then, otherwise):
        """`then` if the condition holds, else `otherwise`."""
        return type(then)(self, self.arith.select(condition.value, then.value, otherwise.value))

    def smaller(self, index: Index, bound: int) -> Index:
        """The minimum of both."""
        return _Index(self, self.arith.minsi(index.value, self._constant(bound)))

    def larger(self, index: Index, bound: int) -> Index:
        """The maximum of both."""
        return _Index(self, self.arith.maxsi(index.value, self._constant(bound)))

    def exchange(self, x: Number, group: int, count: int) -> list[Number]:
        """The numbers `x` of the first `count` threads in this thread's group."""
        lane = self.arith.index_cast(self.lane_type, self.gpu.thread_id(self.gpu.Dimension.x))
        first = self.arith.andi(lane, self._constant(_WARP - group, self.lane_type))
        return [self._from_lane(x, self.arith.addi(first, self._constant(k, self.lane_type))) for k in range(count)]

    def _from_lane(self, x, lane):
        def shuffle(word):
            width = self._constant(_WARP, self.lane_type)
            return self.gpu.ShuffleOp(word, lane, width, self.gpu.ShuffleMode.IDX).results[0]

        if x.value.type == self.ir.F32Type.get():
            return _Number(self, shuffle(x.value))
        # Threads can only exchange words of 32 bits.
        pair = self.ir.VectorType.get((2,), self.lane_type)
        words, both = self.llvm.bitcast(pair, x.value), self.llvm.mlir_undef(pair)
        for j in map(self._constant, range(2)):
            both = self.llvm.insertelement(both, shuffle(self.llvm.extractelement(words, j)), j)
        return _Number(self, self.llvm.bitcast(x.value.type, both))

    def _constant(self, value: int, dtype=None):
        dtype = self.index_type if dtype is None else dtype
        return self.arith.constant(dtype, self.ir.IntegerAttr.get(dtype, value))

    def _index(self, value) -> "_Index":
        return _Index(self, self.arith.index_cast(self.index_type, value))

    def _float_type(self, dtype):
        return {4: self.ir.F32Type, 8: self.ir.F64Type}[dtype.itemsize].get()

    def _pointer(self, ref, dtype) -> _Pointer:
        address = self._index(self.memref.extract_aligned_pointer_as_index(ref)).value
        # A pointer to the GPU's global memory, which is faster to read than a generic address.
        return _Pointer(self.llvm.inttoptr(self.llvm.PointerType.get(1), address), dtype)

    def _address(self, array: _Pointer, at):
        at = at.value if isinstance(at, _Index) else self._constant(at)
        dtype, flags = self._float_type(array.dtype), self.llvm.GEPNoWrapFlags.none
        return self.llvm.getelementptr(array.address.type, array.address, [at], [_DYNAMIC], dtype, flags)


def _access_width(dtype, count: int) -> int:
    """How many of `count` consecutive numbers are read or written at once."""
    return math.gcd(count, _WIDEST_ACCESS // dtype.itemsize)


class _Value:
    def __init__(self, threads: Threads, value):
        self.threads, self.value = threads, value


class _Number(_Value):
    def __add__(self, other):
        return _Number(self.threads, self.threads.arith.addf(self.value, other.value))

    def __mul__(self, other):
        return _Number(self.threads, self.threads.arith.mulf(self.value, other.value))


class _Index(_Value):
    def _apply(self, operation: str, other, swapped: bool = False) -> "_Index":
        other = other.value if isinstance(other, _Index) else self.threads._constant(other)
        operands = (other, self.value) if swapped else (self.value, other)
        return _Index(self.threads, getattr(self.threads.arith, operation)(*operands))

    def __add__(self, other):
        return self._apply("addi", other)

    def __radd__(self, other):
        return self._apply("addi", other)

    def __sub__(self, other):
        return self._apply("subi", other)

    def __rsub__(self, other):
        return self._apply("subi", other, swapped=True)

    def __mul__(self, other):
        return self._apply("muli", other)

    def __floordiv__(self, other):
        return self._apply("divui", other)

    def __mod__(self, other):
        return self._apply("remui", other)

    def __lt__(self, other):
        arith = self.threads.arith
        bound = self.threads._constant(other)
        return _Index(self.threads, arith.cmpi(arith.CmpIPredicate.slt, self.value, bound))
