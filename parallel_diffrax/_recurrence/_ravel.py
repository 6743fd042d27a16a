"""Conversion between pytrees of real or complex arrays and real vectors."""

import math

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree


class Ravel:
    """Converts a state (a pytree of inexact arrays) to one real vector and back.

    A complex leaf becomes its real parts followed by its imaginary parts. Jacobians are then right also for functions that
    are not holomorphic. Leaves of different precision are converted to the widest one, and back by `unravel`. `eps` is the
    largest machine epsilon among the leaves, and so that of the state.
    """

    def __init__(self, example: PyTree):
        structs = jax.eval_shape(lambda: example)
        self._leaves, self._treedef = jtu.tree_flatten(structs)
        real = [jnp.finfo(leaf.dtype).dtype for leaf in self._leaves]
        bits = max((jnp.finfo(d).bits for d in real), default=0)
        widest = {d for d in real if jnp.finfo(d).bits == bits} or {jnp.result_type(float)}
        # As JAX promotes, also where strict promotion is on: float16 and bfloat16 to float32.
        self.dtype = widest.pop() if len(widest) == 1 else jnp.dtype(jnp.float32)
        self.eps = max((float(jnp.finfo(d).eps) for d in real), default=float(jnp.finfo(self.dtype).eps))
        self.size = sum(self._width(leaf) for leaf in self._leaves)

    def __eq__(self, other):
        return isinstance(other, Ravel) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    def _key(self):
        return self._treedef, tuple((leaf.shape, leaf.dtype) for leaf in self._leaves)

    @staticmethod
    def _width(leaf) -> int:
        return math.prod(leaf.shape) * (2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1)

    def ravel(self, tree: PyTree) -> Float[Array, " D"]:
        """The state as a vector of shape `(D,)`."""
        parts = [jnp.zeros((0,), self.dtype)] if self.size == 0 else []
        for leaf in jtu.tree_leaves(tree):
            flat = jnp.ravel(leaf)
            parts += [flat.real, flat.imag] if jnp.iscomplexobj(flat) else [flat]
        return jnp.concatenate([part.astype(self.dtype) for part in parts])

    def unravel(self, vector: Float[Array, " D"]) -> PyTree:
        """The vector as a state."""
        leaves, start = [], 0
        for leaf in self._leaves:
            part = vector[start : start + self._width(leaf)]
            start += self._width(leaf)
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                part = jax.lax.complex(*(p.astype(jnp.finfo(leaf.dtype).dtype) for p in jnp.split(part, 2)))
            leaves.append(part.reshape(leaf.shape).astype(leaf.dtype))
        return jtu.tree_unflatten(self._treedef, leaves)
