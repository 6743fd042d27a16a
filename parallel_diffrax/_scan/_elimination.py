"""Gaussian elimination in array operations, vectorised over a batch of small systems.

Batched LAPACK calls inside one compiled program can deadlock on a CPU with few cores, and are slow on a GPU.
"""

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float


# Up to this size the loop over columns is unrolled.
_LARGEST_UNROLLED_SIZE = 3


def eliminate(matrix: Float[Array, "*batch D D"], rhs: Float[Array, "*batch D K"]) -> Float[Array, "*batch D K"]:
    """Solves `matrix @ x = rhs` by Gauss-Jordan elimination with partial pivoting: work `D^2 (D + K)` in `D` dependent
    elementwise operations. A singular system gives non-finite values."""
    size = matrix.shape[-1]
    if size == 1:
        return rhs / matrix
    rows = jnp.arange(size).reshape(*[1] * (matrix.ndim - 2), size)
    augmented = jnp.concatenate([matrix, rhs], axis=-1)

    def clear(k, augmented):
        column = lax.dynamic_index_in_dim(augmented, k, axis=-1, keepdims=False)
        pivot = jnp.argmax(jnp.where(rows >= k, jnp.abs(column), -1), axis=-1, keepdims=True)
        is_pivot, is_k = (rows == pivot)[..., None], (rows == k)[..., None]
        # Masks select the rows: a gather from every system costs more than reading all of its few numbers.
        row_pivot = jnp.sum(jnp.where(is_pivot, augmented, 0), axis=-2, keepdims=True)
        row_k = lax.dynamic_index_in_dim(augmented, k, axis=-2, keepdims=True)
        swapped = jnp.where(is_pivot, row_k, augmented)
        normalised = row_pivot / lax.dynamic_index_in_dim(row_pivot, k, axis=-1, keepdims=True)
        factor = lax.dynamic_index_in_dim(swapped, k, axis=-1, keepdims=True)
        return jnp.where(is_k, normalised, swapped - factor * normalised)

    if size <= _LARGEST_UNROLLED_SIZE:
        for k in range(size):
            augmented = clear(k, augmented)
    else:
        augmented = lax.fori_loop(0, size, clear, augmented)
    return augmented[..., size:]
