"""How an orthonormal frame is scaled by a product of matrices: QR, step by step or block by block."""

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._growth import compose, ScaledProduct
from ._transitions import matrix_matrix


# Steps that are multiplied before a factorisation.
FRAME_BLOCK = 16


def orthonormalise(Z: Float[Array, "D K"]) -> tuple[Float[Array, "D K"], Float[Array, " K"]]:
    """`Z = Q R` by Gram-Schmidt, each column twice, which is as orthogonal as rounding allows.

    **Returns:** `Q`, and the diagonal of `R`. (`jnp.linalg.qr` is a kernel launch per column on a GPU, and independent
    batches of it deadlock on some CPUs.)
    """
    columns, growths = [], []
    for k in range(Z.shape[1]):
        z = Z[:, k]
        for _ in range(2):
            for q in columns:
                z = z - jnp.sum(q * z) * q
        norm = jnp.sqrt(jnp.sum(z**2))
        columns.append(z / jnp.where(norm > 0, norm, 1))
        growths.append(norm)
    return jnp.stack(columns, axis=1), jnp.stack(growths)


def frame_growth(A: Float[Array, "N D D"], Q: Float[Array, "D K"]) -> tuple[Float[Array, "D K"], Float[Array, "M K"]]:
    """Carries a frame through `N` matrices.

    The logarithms of the diagonal of `R` in `A Q = Q' R` are summed over blocks of 16 matrices that are multiplied first,
    all blocks at once. Where the directions in any block grow so differently that the product forgets the smallest of
    them (by more than half the digits), all are factorised one by one instead.

    **Arguments:** the matrices; the frame.

    **Returns:** the last frame; the logarithms of the growths of each block of `FRAME_BLOCK`, shape `(M, K)`.

    Cost: `N D^3` in parallel, and `N / 16` (at worst `N`) factorisations of `D K^2` in sequence.
    """
    num_steps, size, _ = A.shape
    count = -(-num_steps // FRAME_BLOCK)
    identity = jnp.broadcast_to(jnp.eye(size, dtype=A.dtype), (count * FRAME_BLOCK - num_steps, size, size))
    blocks = jnp.concatenate([A, identity]).reshape(count, FRAME_BLOCK, size, size)

    product = ScaledProduct.make(blocks[:, 0])
    for k in range(1, FRAME_BLOCK):
        product = compose(product, ScaledProduct.make(blocks[:, k]))

    def by_block(Q, element):
        product, _ = element
        Q, growths = orthonormalise(matrix_matrix(product.P, Q))
        return Q, (jnp.log(growths) + product.exponent * jnp.log(jnp.array(2, A.dtype)), growths)

    def by_step(Q, element):
        def one(Q, A):
            Q, growths = orthonormalise(matrix_matrix(A, Q))
            return Q, jnp.log(growths)

        Q, logs = lax.scan(one, Q, element[1])
        return Q, jnp.sum(logs, axis=0)

    coarse_Q, (coarse, growths) = lax.scan(by_block, Q, (product, blocks))
    resolved = jnp.all(jnp.min(growths, axis=1) >= jnp.finfo(A.dtype).eps ** 0.5 * jnp.max(growths, axis=1))
    Q, logs = lax.cond(resolved, lambda: (coarse_Q, coarse), lambda: lax.scan(by_step, Q, (product, blocks)))
    return Q, logs
