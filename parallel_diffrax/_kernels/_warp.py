"""Kernels by NVIDIA Warp (`pip install warp-lang`, optional), for GPUs of compute capability 7.5 and newer, and for CPUs.

A program is traced into the C++ source of one thread. Warp compiles it, keeps what it compiled in its cache on disk, and
launches it when XLA calls back. The call goes through the host and Python, unless XLA has made it part of a CUDA graph.
"""

import contextlib
import functools
import hashlib
import linecache
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from ._threads import access_width, INDEX, Number, Threads, threads_per_block, Value, WARP


_BOOL = np.dtype(bool)
# For each dtype: the type in C++, and in Warp.
_TYPES = {
    np.dtype(np.float32): ("float", "float32"),
    np.dtype(np.float64): ("double", "float64"),
    np.dtype(np.int32): ("int", "int32"),
    np.dtype(np.int64): ("long long", "int64"),
    np.dtype(np.uint32): ("unsigned int", "uint32"),
    _BOOL: ("bool", "bool"),
}
# Sums and products of signed integers wrap around, which in C++ only those of unsigned integers do.
_UNSIGNED = {np.dtype(np.int32): "unsigned int", np.dtype(np.int64): "unsigned long long"}
_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "and": "&", "or": "|", "xor": "^"}
_OPERATORS |= {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# C's functions where they are not named like JAX's primitives.
_FUNCTION_NAMES = {"abs": "fabs", "round_away": "round", "round_even": "rint"}

# Warp's CPU compiler has no headers, but knows C's functions by themselves.
_PRELUDE = """
#if defined(__CUDA_ARCH__)
#define PDX_READ(p) __ldg(p)
#define PDX_CALL(function) ::function
#define PDX_RSQRT(type, x, suffix) ::rsqrt##suffix(x)
#else
#define PDX_READ(p) (*(p))
#define PDX_CALL(function) __builtin_##function
#define PDX_RSQRT(type, x, suffix) ((type)1 / __builtin_sqrt##suffix(x))
#endif
"""


def launch(
    program: Callable,
    operands: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    num_threads: int,
    group: int,
    name: str,
) -> list[Array]:
    """`_threads.Launch`."""
    # Imported on demand: an optional package.
    import warp

    dtypes = tuple(np.dtype(x.dtype) for x in (*operands, *outputs))
    thread, size = source(program, dtypes, num_threads, group), threads_per_block(num_threads)
    padded = (-(-num_threads // size) * size,)
    # XLA finds a kernel by its name, also in a program that another process compiled.
    digest = hashlib.sha256(repr((thread, dtypes, padded, len(outputs))).encode()).hexdigest()[:16]
    kernel = build(thread, dtypes, f"pdx_{name}_{digest}")
    call = warp.jax_kernel(kernel, num_outputs=len(outputs), launch_dims=padded, block_dim=size)
    sizes = {f"x{k + len(operands)}": (math.prod(x.shape),) for k, x in enumerate(outputs)}
    with _quiet():
        found = call(*(x.reshape(-1) for x in operands), output_dims=sizes)
    return [x.reshape(like.shape) for x, like in zip(found, outputs)]


def source(program: Callable, dtypes: Sequence[np.dtype], num_threads: int, group: int) -> str:
    """The source of a thread, with arrays of these dtypes."""
    threads = _WarpThreads()
    arrays = [threads.pointer(k, dtype) for k, dtype in enumerate(dtypes)]
    program(threads, threads.within(Value(threads, "index", INDEX), num_threads, group), *arrays)
    return "\n".join(threads.lines) + "\n"


@functools.cache
def build(thread: str, dtypes: tuple[np.dtype, ...], name: str):
    """A kernel of Warp's, in a module of its own, from the source of a thread."""
    import warp

    names = [f"x{k}" for k in range(len(dtypes))]
    parameters = ", ".join(f"{x}: warp.array(dtype=warp.{_TYPES[dtype][1]})" for x, dtype in zip(names, dtypes))
    text = f"""
def thread({parameters}, index: warp.int64): ...

def {name}({parameters}):
    thread({", ".join(names)}, warp.int64(warp.tid()))
"""
    # Warp reads the source of Python functions.
    file = f"<{name}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    scope = {"__name__": name, "warp": warp}
    exec(compile(text, file, "exec"), scope)
    scope["thread"] = warp.func_native(thread)(scope["thread"])
    return warp.kernel(enable_backward=False)(scope[name])


@contextlib.contextmanager
def _quiet():
    """Without what Warp prints when it starts and when it compiles."""
    import warp

    before = warp.config.log_level
    warp.config.log_level = max(before, warp.LOG_WARNING)
    try:
        yield
    finally:
        warp.config.log_level = before


class _Pointer(NamedTuple):
    name: str
    dtype: np.dtype


class _WarpThreads(Threads):
    def __init__(self):
        self.lines, self.count = [_PRELUDE], 0

    def pointer(self, k: int, dtype: np.dtype) -> _Pointer:
        """The numbers of an array of the kernel."""
        kind = _TYPES[dtype][0]
        self.lines.append(f"{kind}* p{k} = ({kind}*)x{k}.data;")
        return _Pointer(f"p{k}", dtype)

    def constant(self, x: Any) -> Number:
        if x.dtype == _BOOL:
            text = "true" if x else "false"
        elif x.dtype.kind != "f":
            # The smallest integer has no literal of its own.
            text = f"(-{-(int(x) + 1)}LL - 1)" if x < 0 else f"{int(x)}LL"
            text = f"({_TYPES[x.dtype][0]})({text})"
        elif np.isfinite(x):
            text = f"({float(x).hex()}{_suffix(x.dtype)})"
        else:
            text = f"({_TYPES[x.dtype][0]})({'0.0' if np.isnan(x) else '1.0' if x > 0 else '-1.0'} / 0.0)"
        return Value(self, text, x.dtype)

    def arithmetic(self, name: str, x: Number, y: Number) -> Number:
        if name in ("add", "sub", "mul") and x.dtype in _UNSIGNED:
            kind = _UNSIGNED[x.dtype]
            wrapped = f"({kind})({x.value}) {_OPERATORS[name]} ({kind})({y.value})"
            return self._new(f"({_TYPES[x.dtype][0]})({wrapped})", x.dtype)
        return self._new(f"{x.value} {_OPERATORS[name]} {y.value}", x.dtype)

    def unsigned(self, name: str, x: Number, y: int) -> Number:
        return self._new(f"(long long)((unsigned long long)({x.value}) {_OPERATORS[name]} {y}ULL)", INDEX)

    def compare(self, name: str, x: Number, y: Number) -> Number:
        return self._new(f"{x.value} {_OPERATORS[name]} {y.value}", _BOOL)

    def select(self, condition: Number, then: Number, otherwise: Number) -> Number:
        return self._new(f"{condition.value} ? {then.value} : {otherwise.value}", then.dtype)

    def convert(self, x: Number, dtype) -> Number:
        dtype = np.dtype(dtype)
        return self._new(f"({_TYPES[dtype][0]})({x.value})", dtype)

    def function(self, name: str, *xs: Number) -> Number:
        dtype = xs[0].dtype
        kind, suffix, values = _TYPES[dtype][0], _suffix(dtype), ", ".join(x.value for x in xs)
        if name == "neg":
            return self._new(f"-{values}", dtype)
        if name == "rsqrt":
            return self._new(f"PDX_RSQRT({kind}, {values}, {suffix})", dtype)
        return self._new(f"PDX_CALL({_FUNCTION_NAMES.get(name, name)}{suffix})({values})", dtype)

    def multiply_add(self, a: Number, b: Number, c: Number) -> Number:
        return self._new(f"PDX_CALL(fma{_suffix(a.dtype)})({a.value}, {b.value}, {c.value})", a.dtype)

    def load(self, array, start, count: int = 1, constant: bool = False) -> list[Number]:
        width = access_width(array.dtype, count)
        if width == 1:
            address = lambda k: f"{array.name} + {self._index(start + k)}"
            read = "PDX_READ({})" if constant else "*({})"
            return [self._new(read.format(address(k)), array.dtype) for k in range(count)]
        numbers = []
        for k in range(0, count, width):
            several = self._name()
            self.lines.append(
                f"const {self._vector(array.dtype, width)} {several} = {self._at(array, start + k, width)};"
            )
            numbers += [Value(self, f"{several}.x[{j}]", array.dtype) for j in range(width)]
        return numbers

    def store(self, array, start, numbers: Sequence[Number]):
        width = access_width(array.dtype, len(numbers))
        for k in range(0, len(numbers), width):
            values = ", ".join(x.value for x in numbers[k : k + width])
            value = f"{self._vector(array.dtype, width)}{{{{{values}}}}}" if width > 1 else values
            self.lines.append(f"{self._at(array, start + k, width)} = {value};")

    def while_loop(self, condition: Callable, body: Callable, carry: Sequence[Number]) -> list[Number]:
        variables = [self._variable(x) for x in carry]
        self.lines.append("while (true) {")
        self.lines.append(f"if (!({condition(variables).value})) break;")
        self._assign(variables, body(variables))
        self.lines.append("}")
        return variables

    def loop(self, count: int, body: Callable, carry: Sequence[Number]) -> list[Number]:
        variables, k = [self._variable(x) for x in carry], self._name()
        self.lines.append(f"for (long long {k} = 0; {k} < {count}; ++{k}) {{")
        self._assign(variables, body(Value(self, k, INDEX), variables))
        self.lines.append("}")
        return variables

    def exchange(self, x: Number, group: int, count: int) -> list[Number]:
        # (Does not compile for a CPU, where threads run one after another.)
        first = f"(threadIdx.x & {WARP - group})"
        return [self._new(f"__shfl_sync(0xffffffffu, {x.value}, {first} + {k})", x.dtype) for k in range(count)]

    def _name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def _new(self, expression: str, dtype: np.dtype) -> Value:
        """A number with the value of an expression."""
        name = self._name()
        self.lines.append(f"const {_TYPES[dtype][0]} {name} = {expression};")
        return Value(self, name, dtype)

    def _variable(self, x: Number) -> Value:
        name = self._name()
        self.lines.append(f"{_TYPES[x.dtype][0]} {name} = {x.value};")
        return Value(self, name, x.dtype)

    def _assign(self, variables: Sequence[Number], values: Sequence[Number]):
        """Assigns all values at once: they may be other variables."""
        values = [self._new(x.value, x.dtype) for x in values]
        self.lines += [f"{variable.value} = {x.value};" for variable, x in zip(variables, values)]

    def _index(self, x) -> str:
        return x.value if isinstance(x, Value) else str(x)

    def _vector(self, dtype: np.dtype, width: int) -> str:
        """A type of `width` numbers that are read or written at once."""
        name = f"pdx_{dtype.name}_{width}"
        definition = f"struct alignas({width * dtype.itemsize}) {name} {{ {_TYPES[dtype][0]} x[{width}]; }};"
        if definition not in self.lines:
            # The first line of the source, where every loop sees it.
            self.lines.insert(1, definition)
        return name

    def _at(self, array: _Pointer, at, width: int) -> str:
        kind = _TYPES[array.dtype][0] if width == 1 else self._vector(array.dtype, width)
        return f"*({kind}*)({array.name} + {self._index(at)})"


def _suffix(dtype: np.dtype) -> str:
    """The last letter of C's names for a dtype."""
    return "f" if dtype == np.float32 else ""
