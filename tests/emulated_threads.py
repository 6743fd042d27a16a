"""The threads of a kernel in lockstep, emulated in NumPy: what `_kernels/_threads.py` traces for a GPU runs on a CPU.

Access outside of an array raises. So does a thread that writes to an entry to which another writes something else.
"""

import jax
import numpy as np


class EmulatedThreads:
    """The interface of `Threads`. Each value holds the values of all threads."""

    def __init__(self, num_threads):
        self.num_threads = num_threads

    def load(self, array, start, count):
        assert np.all(np.asarray(start) % count == 0) or count == 1
        return [array[_inside(start + k, array)] for k in range(count)]

    def store(self, array, start, numbers):
        for k, x in enumerate(numbers):
            places = np.broadcast_to(_inside(start + k, array), self.num_threads)
            array[places] = x
            np.testing.assert_array_equal(array[places], np.broadcast_to(x, self.num_threads))

    def multiply_add(self, a, b, c):
        return a * b + c

    def loop(self, count, body, carry):
        for k in range(count):
            carry = body(k, carry)
        return carry

    def select(self, condition, then, otherwise):
        return np.where(condition, then, otherwise)

    def smaller(self, index, bound):
        return np.minimum(index, bound)

    def larger(self, index, bound):
        return np.maximum(index, bound)

    def exchange(self, x, group, count):
        groups = np.broadcast_to(x, self.num_threads).reshape(-1, group)
        return [np.repeat(groups[:, k], group) for k in range(count)]


def _inside(places, array):
    assert np.all((places >= 0) & (places < array.size))
    return places


def launch(program, operands, outputs, num_threads, group, name):
    """`_threads.launch` on a CPU."""
    del name
    # As there, additional threads in the last block repeat the last group.
    index = np.arange(-(-num_threads // 128) * 128)
    index = np.where(index < num_threads, index, num_threads - group + index % group)

    def run(*operands):
        arrays = [np.asarray(x).reshape(-1) for x in operands]
        found = [np.full(int(np.prod(x.shape)), np.nan, x.dtype) for x in outputs]
        with np.errstate(all="ignore"):
            program(EmulatedThreads(index.size), index, *arrays, *found)
        return [x.reshape(like.shape) for x, like in zip(found, outputs)]

    return jax.pure_callback(run, list(outputs), *operands)
