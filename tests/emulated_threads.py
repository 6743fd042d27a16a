"""The threads of a kernel in lockstep, emulated in NumPy: what `_kernels/_threads.py` traces for a GPU runs on a CPU.

Threads that have left a loop are masked. Access outside of an array raises. So does a
thread that writes to an entry to which another writes something else.
"""

import jax
import numpy as np

from parallel_diffrax._kernels._operations import FUNCTIONS


_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_ARITHMETIC |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
_COMPARE |= {"ge": np.greater_equal}


class EmulatedThreads:
    """The interface of `Threads`. Each value holds the values of all threads."""

    def __init__(self, num_threads):
        self.num_threads = num_threads
        # The threads that have not left the loop.
        self.active = np.ones(num_threads, bool)

    def load(self, array, start, count=1, constant=False):
        del constant
        assert np.all(np.asarray(start) % count == 0) or count == 1
        return [array[self._inside(start + k, array)] for k in range(count)]

    def store(self, array, start, numbers):
        for k, x in enumerate(numbers):
            places = np.broadcast_to(self._inside(start + k, array), self.num_threads)[self.active]
            x = np.broadcast_to(x, self.num_threads)[self.active]
            assert x.dtype == array.dtype
            array[places] = x
            np.testing.assert_array_equal(array[places], x)

    def _inside(self, places, array):
        assert np.all(((places >= 0) & (places < array.size)) | ~self.active)
        return np.clip(places, 0, array.size - 1)

    def constant(self, x):
        assert isinstance(x, np.generic)
        return x

    def arithmetic(self, name, x, y):
        assert x.dtype == y.dtype, (name, x.dtype, y.dtype)
        if name in _ARITHMETIC:
            return _ARITHMETIC[name](x, y)
        if x.dtype.kind == "f":
            assert name == "div"
            return x / y
        # As in C, toward zero.
        quotient = (np.abs(x) // np.abs(y) * np.sign(x) * np.sign(y)).astype(x.dtype)
        return quotient if name == "div" else x - y * quotient

    def compare(self, name, x, y):
        assert x.dtype == y.dtype, (name, x.dtype, y.dtype)
        return _COMPARE[name](x, y)

    def convert(self, x, dtype):
        return np.asarray(x).astype(dtype)[()]

    def function(self, name, *xs):
        assert len({x.dtype for x in xs}) == 1 and xs[0].dtype.kind == "f"
        out = FUNCTIONS[name](*xs)
        assert out.dtype == xs[0].dtype
        return out

    def while_loop(self, condition, body, carry):
        before = self.active
        while True:
            self.active = self.active & condition(carry)
            if not self.active.any():
                break
            new = body(carry)
            assert [x.dtype for x in new] == [x.dtype for x in carry]
            carry = [np.where(self.active, x, old) for x, old in zip(new, carry)]
        self.active = before
        return carry

    def multiply_add(self, a, b, c):
        # NumPy's widest numbers round products of float32 and, on most machines, float64 once or nearly so.
        wide = np.float64 if np.asarray(a).dtype == np.float32 else np.longdouble
        return np.asarray(np.asarray(a, wide) * np.asarray(b, wide) + np.asarray(c, wide), np.asarray(a).dtype)[()]

    def loop(self, count, body, carry):
        for k in range(count):
            carry = body(k, carry)
        return carry

    def select(self, condition, then, otherwise):
        assert not hasattr(then, "dtype") or then.dtype == otherwise.dtype
        return np.where(condition, then, otherwise)

    def smaller(self, index, bound):
        return np.minimum(index, bound)

    def larger(self, index, bound):
        return np.maximum(index, bound)

    def exchange(self, x, group, count):
        groups = np.broadcast_to(x, self.num_threads).reshape(-1, group)
        return [np.repeat(groups[:, k], group) for k in range(count)]


def launch(program, operands, outputs, num_threads, group, name):
    """`_threads.launch` on a CPU."""
    del name
    # As there, additional threads in the last block repeat the last group.
    index = np.arange(-(-num_threads // 128) * 128)
    index = np.where(index < num_threads, index, num_threads - group + index % group)

    def run(*operands):
        arrays = [np.asarray(x).reshape(-1) for x in operands]
        unwritten = [np.nan if x.dtype.kind == "f" else -99 for x in outputs]
        found = [np.full(int(np.prod(x.shape)), value, x.dtype) for x, value in zip(outputs, unwritten)]
        with np.errstate(all="ignore"):
            program(EmulatedThreads(index.size), index, *arrays, *found)
        return [x.reshape(like.shape) for x, like in zip(found, outputs)]

    return jax.pure_callback(run, list(outputs), *operands)
