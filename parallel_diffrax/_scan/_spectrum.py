"""The growth of an orthonormal frame under a product of matrices, by QR step by step or segment by segment."""

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._growth import compose, exponent_log, ScaledProduct
from ._segments import split_segments
from ._transitions import matrix_matrix


# The length of the segments: number of matrices multiplied before a factorisation.
FRAME_BLOCK = 16


def orthonormalise(Z: Float[Array, "D K"]) -> tuple[Float[Array, "D K"], Float[Array, " K"]]:
    """`Q`, and the diagonal of `R` (the growth factors), with `Z = Q R`: Gram-Schmidt, applied twice to each column, which
    makes `Q` orthogonal to rounding. (`jnp.linalg.qr` launches a kernel per column on a GPU, and independent batches of it
    deadlock on some CPUs.)"""
    columns, factors = [], []
    for k in range(Z.shape[1]):
        z = Z[:, k]
        for _ in range(2):
            for q in columns:
                z = z - jnp.sum(q * z) * q
        norm = jnp.sqrt(jnp.sum(z**2))
        columns.append(z / jnp.where(norm > 0, norm, 1))
        factors.append(norm)
    return jnp.stack(columns, axis=1), jnp.stack(factors)


def frame_growth(A: Float[Array, "N D D"], Q: Float[Array, "D K"]) -> tuple[Float[Array, "D K"], Float[Array, "M K"]]:
    """Carries a frame through `N` matrices by `A[i] Q = Q' R`. Returns the last frame, and the logarithms of its growth
    factors, `diag(R)`, over each segment.

    The matrices of each segment of 16 are multiplied first, all segments at once, and one factorisation per segment follows.
    If the directions in any segment grow so differently that the product loses more than half the digits of the smallest,
    all matrices are factorised one by one instead. The cost is `N D^3` in parallel, and `N / 16` (at worst `N`) sequential
    factorisations of `D K^2`.
    """
    segments = split_segments(A, length=FRAME_BLOCK, fill=jnp.eye(A.shape[-1], dtype=A.dtype))
    product = ScaledProduct.make(segments[:, 0])
    for k in range(1, FRAME_BLOCK):
        product = compose(product, ScaledProduct.make(segments[:, k]))

    def by_segment(Q, element):
        product, _ = element
        Q, factors = orthonormalise(matrix_matrix(product.P, Q))
        return Q, (jnp.log(factors) + exponent_log(product.exponent, A.dtype), factors)

    def by_step(Q, element):
        def one(Q, A):
            Q, factors = orthonormalise(matrix_matrix(A, Q))
            return Q, jnp.log(factors)

        Q, logs = lax.scan(one, Q, element[1])
        return Q, jnp.sum(logs, axis=0)

    coarse_Q, (coarse, factors) = lax.scan(by_segment, Q, (product, segments))
    half = float(jnp.finfo(A.dtype).eps) ** 0.5
    resolved = jnp.all(jnp.min(factors, axis=1) >= half * jnp.max(factors, axis=1))
    return lax.cond(resolved, lambda: (coarse_Q, coarse), lambda: lax.scan(by_step, Q, (product, segments)))
