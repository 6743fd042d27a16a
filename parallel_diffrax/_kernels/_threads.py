"""Kernels written thread by thread: what a backend has to offer.

A program is a Python function for one thread. A backend calls it once, with symbolic values of the thread, and compiles what
the program does with them. There are no branches. Every thread leaves a loop by itself. Adjacent threads can exchange
numbers outside of loops of unknown length.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np


WARP = 32
BLOCK = 128
# Up to this many threads, each warp has a block of its own, which spreads the warps over the whole GPU.
_FEW_THREADS = 2**14
# The largest number of bytes that a thread reads or writes at once.
_WIDEST_ACCESS = 16
INDEX = np.dtype(np.int64)

# A number of a thread, and one that is an index: an int64, or a Python integer.
Number: TypeAlias = Any
Index: TypeAlias = Any

# `launch(program, operands, outputs, num_threads, group, name)` of a backend runs `program(threads, index, *arrays)` in
# `num_threads` threads, and returns the outputs. `operands` are arrays, `outputs` are `jax.ShapeDtypeStruct`s; `arrays` are
# handles of both, flattened, of numbers of 4 or 8 bytes. `group`, a divisor of `num_threads`, is the number of adjacent
# threads that work together. If they exchange numbers, it is a power of two, at most 32. Additional threads may repeat the
# work of others. `name` appears in profilers.
Launch: TypeAlias = Callable[..., list]


def threads_per_block(num_threads: int) -> int:
    """How many threads of a block do anything."""
    return WARP if num_threads <= _FEW_THREADS else BLOCK


def access_width(dtype: np.dtype, count: int) -> int:
    """How many of `count` consecutive numbers are read or written at once."""
    return math.gcd(count, _WIDEST_ACCESS // dtype.itemsize)


class Threads(abc.ABC):
    """The operations of a thread: a backend of `_operations.py`, memory and loops. Numbers of one dtype support `+` and `*`,
    integers of at least zero also `- // % <` with each other and with Python integers."""

    @abc.abstractmethod
    def constant(self, x: Any) -> Number:
        """A NumPy scalar as a number."""

    @abc.abstractmethod
    def arithmetic(self, name: str, x: Number, y: Number) -> Number:
        """`add`, `sub`, `mul`, `div`, `and`, `or` or `xor` of two numbers of one dtype; `rem` of two integers. A product and
        a sum may become one operation, rounded once, as in XLA's own kernels."""

    @abc.abstractmethod
    def unsigned(self, name: str, x: Index, y: int) -> Index:
        """`div` or `rem` of an index of at least zero."""

    @abc.abstractmethod
    def compare(self, name: str, x: Number, y: Number) -> Number:
        """`eq`, `ne`, `lt`, `le`, `gt` or `ge` of two numbers of one dtype. Only `ne` holds for NaN."""

    @abc.abstractmethod
    def select(self, condition: Number, then: Number, otherwise: Number) -> Number:
        """`then` if the condition holds, else `otherwise`."""

    @abc.abstractmethod
    def convert(self, x: Number, dtype) -> Number:
        """A number in another dtype. If a floating-point number becomes an integer, it must be in range."""

    @abc.abstractmethod
    def function(self, name: str, *xs: Number) -> Number:
        """A function of floating-point numbers, by the name of its primitive."""

    @abc.abstractmethod
    def multiply_add(self, a: Number, b: Number, c: Number) -> Number:
        """`a b + c`, rounded once."""

    @abc.abstractmethod
    def load(self, array, start: Index, count: int = 1, constant: bool = False) -> list[Number]:
        """Reads `count` numbers from index `start` on, which must be a multiple of `count`. `constant`: the kernel never
        writes to this array."""

    @abc.abstractmethod
    def store(self, array, start: Index, numbers: Sequence[Number]):
        """Writes numbers from index `start` on, which must be a multiple of their count."""

    @abc.abstractmethod
    def while_loop(self, condition: Callable, body: Callable, carry: Sequence[Number]) -> list[Number]:
        """`while condition(carry): carry = body(carry)`, for each thread by itself."""

    @abc.abstractmethod
    def loop(self, count: int, body: Callable, carry: Sequence[Number]) -> list[Number]:
        """`carry = body(k, carry)` for `k = 0 .. count - 1`."""

    @abc.abstractmethod
    def exchange(self, x: Number, group: int, count: int) -> list[Number]:
        """The numbers `x` of the first `count` threads in this thread's group."""

    def smaller(self, index: Index, bound: int) -> Index:
        """The minimum of both."""
        return self.select(index < bound, index, self.constant(INDEX.type(bound)))

    def larger(self, index: Index, bound: int) -> Index:
        """The maximum of both."""
        return self.select(index < bound, self.constant(INDEX.type(bound)), index)

    def within(self, index: Index, num_threads: int, group: int) -> Index:
        """The index of a thread. Additional threads repeat the last group."""
        if num_threads % threads_per_block(num_threads) == 0:
            return index
        return self.select(index < num_threads, index, index % group + (num_threads - group))


@dataclasses.dataclass
class Value:
    """A number of a backend: what the backend knows it by, and its dtype."""

    threads: Threads
    value: Any
    dtype: np.dtype

    def _number(self, x) -> "Value":
        return self.threads.constant(np.asarray(x, self.dtype)[()]) if isinstance(x, int) else x

    def __add__(self, other):
        return self.threads.arithmetic("add", self, self._number(other))

    def __radd__(self, other):
        return self.threads.arithmetic("add", self._number(other), self)

    def __sub__(self, other):
        return self.threads.arithmetic("sub", self, self._number(other))

    def __rsub__(self, other):
        return self.threads.arithmetic("sub", self._number(other), self)

    def __mul__(self, other):
        return self.threads.arithmetic("mul", self, self._number(other))

    def __floordiv__(self, other: int):
        return self.threads.unsigned("div", self, other)

    def __mod__(self, other: int):
        return self.threads.unsigned("rem", self, other)

    def __lt__(self, other):
        return self.threads.compare("lt", self, self._number(other))
