"""Kernels in Pallas' Mosaic GPU, which is a part of JAX, for Hopper and newer: XLA launches them itself.

A program is traced into MLIR inside a Mosaic kernel. JAX calls this part of it unstable.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.lax as lax
import numpy as np
from jaxtyping import Array

from ._threads import access_width, BLOCK, INDEX, Number, Threads, threads_per_block, Value, WARP


# MLIR's mark for an index that is not a constant.
_DYNAMIC = -(2**31)
# MLIR's functions where they are not named like JAX's primitives.
_FUNCTION_NAMES = {"abs": "absf", "pow": "powf", "round_away": "round", "round_even": "roundeven"}


def launch(
    program: Callable,
    operands: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    num_threads: int,
    group: int,
    name: str,
) -> list[Array]:
    """`_threads.Launch`."""
    # Imported on demand: a large part of JAX, for some GPUs only.
    from jax.experimental.pallas import mosaic_gpu as mosaic

    size = threads_per_block(num_threads)
    dtypes = [np.dtype(x.dtype) for x in (*operands, *outputs)]

    def body(*refs):
        @mosaic.inline_mgpu(arg_types=tuple(mosaic.RefType() for _ in refs))
        def inline(ctx, *refs):
            del ctx
            _MosaicThreads().run(program, refs, dtypes, num_threads, group)

        inline(*refs)

    body.__name__ = name
    num_blocks = -(-num_threads // size)
    flat = tuple(jax.ShapeDtypeStruct((math.prod(x.shape),), x.dtype) for x in outputs)
    # A thread waits only for threads with which it exchanges numbers.
    params = mosaic.CompilerParams(unsafe_no_auto_barriers=True)
    # JAX before 0.10 has another name for it.
    out = "out_type" if "out_type" in inspect.signature(mosaic.kernel).parameters else "out_shape"
    options: dict[str, Any] = {out: flat, "grid": (num_blocks,), "grid_names": ("block",), "compiler_params": params}
    kernel = mosaic.kernel(body, **options)
    # Without the barrier, XLA would pass a slice of another array without a copy if it begins at a multiple of 128 bytes.
    # Mosaic requires 256.
    found = kernel(*lax.optimization_barrier([x.reshape(-1) for x in operands]))
    return [x.reshape(like.shape) for x, like in zip(found, outputs)]


@dataclasses.dataclass
class _Pointer:
    address: Any
    dtype: np.dtype


class _MosaicThreads(Threads):
    def __init__(self):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, gpu, llvm, math as mlir_math, memref, scf

        self.ir, self.arith, self.gpu, self.llvm, self.math = ir, arith, gpu, llvm, mlir_math
        self.memref, self.scf = memref, scf
        self.index_type = ir.IntegerType.get_signless(64)
        self.lane_type = ir.IntegerType.get_signless(32)

    def run(self, program, refs, dtypes, num_threads: int, group: int):
        """Traces a program for a one-dimensional grid of blocks."""
        size, within = threads_per_block(num_threads), self._index(self.gpu.thread_id(self.gpu.Dimension.x))
        index = self._index(self.gpu.block_id(self.gpu.Dimension.x)) * size + within
        index = self.within(index, num_threads, group)
        arrays = [self._pointer(ref, dtype) for ref, dtype in zip(refs, dtypes)]
        if size == BLOCK:
            program(self, index, *arrays)
            return
        # Mosaic's blocks have four warps. The ones that are not needed end here.
        condition = self.scf.IfOp((within < size).value)
        with self.ir.InsertionPoint(condition.then_block):
            program(self, index, *arrays)
            self.scf.YieldOp([])

    def load(self, array, start: Any, count: int = 1, constant: bool = False) -> list[Number]:
        dtype, numbers = self._type(array.dtype), []
        width = access_width(array.dtype, count)
        as_number = lambda value: Value(self, value, array.dtype)
        for k in range(0, count, width):
            address, alignment = self._address(array, start + k), width * array.dtype.itemsize
            kind = dtype if width == 1 else self.ir.VectorType.get((width,), dtype)
            value = self.llvm.load(kind, address, alignment=alignment, invariant=constant)
            elements = [value] if width == 1 else (self.llvm.extractelement(value, self._int(j)) for j in range(width))
            numbers.extend(map(as_number, elements))
        return numbers

    def store(self, array, start: Any, numbers: Sequence[Number]):
        dtype, width = self._type(array.dtype), access_width(array.dtype, len(numbers))
        for k in range(0, len(numbers), width):
            address, alignment = self._address(array, start + k), width * array.dtype.itemsize
            value = numbers[k].value
            if width > 1:
                value = self.llvm.mlir_undef(self.ir.VectorType.get((width,), dtype))
                for j in range(width):
                    value = self.llvm.insertelement(value, numbers[k + j].value, self._int(j))
            self.llvm.store(value, address, alignment=alignment)

    def constant(self, x: Any) -> Number:
        dtype = self._type(x.dtype)
        if x.dtype.kind == "f":
            attribute = self.ir.FloatAttr.get(dtype, float(x))
        else:
            # MLIR's integers have no sign. It reads them as signed.
            attribute = self.ir.IntegerAttr.get(dtype, int(x.view(np.int32) if x.dtype.kind == "u" else x))
        return Value(self, self.arith.constant(dtype, attribute), x.dtype)

    def arithmetic(self, name: str, x: Number, y: Number) -> Number:
        if x.dtype.kind == "f":
            value = getattr(self.arith, name + "f")(x.value, y.value, fastmath=self.arith.FastMathFlags.contract)
        else:
            suffix = {"i": "si", "u": "ui"}[x.dtype.kind] if name in ("div", "rem") else "i"
            value = getattr(self.arith, name + suffix)(x.value, y.value)
        return Value(self, value, x.dtype)

    def unsigned(self, name, x, y: int):
        return Value(self, getattr(self.arith, name + "ui")(x.value, self._int(y)), x.dtype)

    def compare(self, name: str, x: Number, y: Number) -> Number:
        if x.dtype.kind == "f":
            predicate = getattr(self.arith.CmpFPredicate, "UNE" if name == "ne" else "O" + name.upper())
            return Value(self, self.arith.cmpf(predicate, x.value, y.value), np.dtype(bool))
        sign = "" if name in ("eq", "ne") else "s" if x.dtype.kind == "i" else "u"
        value = self.arith.cmpi(getattr(self.arith.CmpIPredicate, sign + name), x.value, y.value)
        return Value(self, value, np.dtype(bool))

    def select(self, condition: Number, then: Number, otherwise: Number) -> Number:
        return Value(self, self.arith.select(condition.value, then.value, otherwise.value), then.dtype)

    def convert(self, x: Number, dtype) -> Number:
        dtype, old = np.dtype(dtype), x.dtype
        kind, wider = self._type(dtype), dtype.itemsize > old.itemsize
        if old.kind == "f" and dtype.kind == "f":
            value = (self.arith.extf if wider else self.arith.truncf)(kind, x.value)
        elif old.kind == "f":
            value = (self.arith.fptoui if dtype.kind == "u" else self.arith.fptosi)(kind, x.value)
        elif dtype.kind == "f":
            value = (self.arith.sitofp if old.kind == "i" else self.arith.uitofp)(kind, x.value)
        elif wider:
            value = (self.arith.extsi if old.kind == "i" else self.arith.extui)(kind, x.value)
        else:
            value = self.arith.trunci(kind, x.value) if dtype.itemsize < old.itemsize else x.value
        return Value(self, value, dtype)

    def function(self, name: str, *xs: Number) -> Number:
        function = self.arith.negf if name == "neg" else getattr(self.math, _FUNCTION_NAMES.get(name, name))
        return Value(self, function(*(x.value for x in xs)), xs[0].dtype)

    def while_loop(self, condition: Callable, body: Callable, carry: Sequence[Number]) -> list[Number]:
        dtypes, types = [x.dtype for x in carry], [x.value.type for x in carry]
        wrap = lambda values: [Value(self, x, dtype) for x, dtype in zip(values, dtypes)]
        loop = self.scf.WhileOp(types, [x.value for x in carry])
        before, after = loop.before.blocks.append(*types), loop.after.blocks.append(*types)
        with self.ir.InsertionPoint(before):
            self.scf.condition(condition(wrap(before.arguments)).value, before.arguments)
        with self.ir.InsertionPoint(after):
            self.scf.YieldOp([x.value for x in body(wrap(after.arguments))])
        return wrap(loop.results)

    def multiply_add(self, a: Number, b: Number, c: Number) -> Number:
        return Value(self, self.math.fma(a.value, b.value, c.value), a.dtype)

    def loop(self, count: int, body: Callable, carry: Sequence[Number]) -> list[Number]:
        bounds, dtypes = (self._int(k) for k in (0, count, 1)), [x.dtype for x in carry]
        wrap = lambda values: [Value(self, x, dtype) for x, dtype in zip(values, dtypes)]
        loop = self.scf.ForOp(*bounds, [x.value for x in carry])
        with self.ir.InsertionPoint(loop.body):
            carry = body(Value(self, loop.induction_variable, INDEX), wrap(loop.inner_iter_args))
            self.scf.YieldOp([x.value for x in carry])
        return wrap(loop.results)

    def exchange(self, x: Number, group: int, count: int) -> list[Number]:
        lane = self.arith.index_cast(self.lane_type, self.gpu.thread_id(self.gpu.Dimension.x))
        first = self.arith.andi(lane, self._int(WARP - group, self.lane_type))
        return [self._from_lane(x, self.arith.addi(first, self._int(k, self.lane_type))) for k in range(count)]

    def _from_lane(self, x, lane):
        def shuffle(word):
            width = self._int(WARP, self.lane_type)
            return self.gpu.ShuffleOp(word, lane, width, self.gpu.ShuffleMode.IDX).results[0]

        if x.value.type == self.ir.F32Type.get():
            return Value(self, shuffle(x.value), x.dtype)
        # Threads can only exchange words of 32 bits.
        pair = self.ir.VectorType.get((2,), self.lane_type)
        words, both = self.llvm.bitcast(pair, x.value), self.llvm.mlir_undef(pair)
        for j in map(self._int, range(2)):
            both = self.llvm.insertelement(both, shuffle(self.llvm.extractelement(words, j)), j)
        return Value(self, self.llvm.bitcast(x.value.type, both), x.dtype)

    def _int(self, value: int, dtype=None):
        dtype = self.index_type if dtype is None else dtype
        return self.arith.constant(dtype, self.ir.IntegerAttr.get(dtype, value))

    def _index(self, value) -> Value:
        return Value(self, self.arith.index_cast(self.index_type, value), INDEX)

    def _type(self, dtype):
        if dtype.kind == "f":
            return {4: self.ir.F32Type, 8: self.ir.F64Type}[dtype.itemsize].get()
        return self.ir.IntegerType.get_signless(1 if dtype.kind == "b" else 8 * dtype.itemsize)

    def _pointer(self, ref, dtype) -> _Pointer:
        address = self._index(self.memref.extract_aligned_pointer_as_index(ref)).value
        # A pointer to the GPU's global memory, which is faster to read than a generic address.
        return _Pointer(self.llvm.inttoptr(self.llvm.PointerType.get(1), address), dtype)

    def _address(self, array: _Pointer, at):
        at = at.value if isinstance(at, Value) else self._int(at)
        dtype, flags = self._type(array.dtype), self.llvm.GEPNoWrapFlags.none
        return self.llvm.getelementptr(array.address.type, array.address, [at], [_DYNAMIC], dtype, flags)
