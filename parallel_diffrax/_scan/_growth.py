"""Products of transitions that neither overflow nor underflow, and how fast they grow."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._abstract_scan import AbstractScan
from ._transitions import DenseTransitions, matrix_matrix


def binary_exponent(x: Float[Array, "*N"]) -> Int[Array, "*N"]:
    """The exponents `e` with `2^e <= x < 2^(e+1)`, of positive numbers; 0 where `x` is 0. Read off the bits: logarithms are
    not exact."""
    bits, mantissa, bias = _layout(x.dtype)
    exponent = (lax.bitcast_convert_type(x, bits) >> mantissa) - bias
    return jnp.where(x > 0, exponent, 0).astype(jnp.int32)


def power_of_two(exponent: Int[Array, "*N"], dtype) -> Float[Array, "*N"]:
    """`2^exponent` exactly, within the range of the dtype's normal numbers."""
    bits, mantissa, bias = _layout(dtype)
    exponent = jnp.clip(exponent, 1 - bias, bias).astype(bits)
    return lax.bitcast_convert_type((exponent + bias) << mantissa, dtype)


def _layout(dtype):
    """The integer type of the same width, the bits of the mantissa, the bias of the exponent."""
    info = jnp.finfo(dtype)
    bits = {16: jnp.int16, 32: jnp.int32, 64: jnp.int64}[info.bits]
    return bits, info.nmant, -int(info.minexp) + 1


class ScaledProduct(eqx.Module):
    """The matrices `2^exponent P`, where the largest entry of `P` is about 1: composition is associative and exact in the
    exponents, so that rounding does not add up in them either.

    **Attributes:** `P`, shape `(N, D, D)`; `exponent`, shape `(N,)`.
    """

    P: Float[Array, "*N D D"]
    exponent: Int[Array, "*N"]

    @classmethod
    def make(cls, P: Float[Array, "*N D D"]) -> "ScaledProduct":
        """Of matrices as they are."""
        return cls(P, jnp.zeros(P.shape[:-2], jnp.int32)).normalised()

    @classmethod
    def identity(cls, size: int, dtype) -> "ScaledProduct":
        """The product of no matrices."""
        return cls(jnp.eye(size, dtype=dtype), jnp.array(0, jnp.int32))

    def normalised(self) -> "ScaledProduct":
        """The same matrices, with `P` of size 1 again."""
        exponent = binary_exponent(jnp.max(jnp.abs(self.P), axis=(-2, -1)))
        return ScaledProduct(self.P * power_of_two(-exponent, self.P.dtype)[..., None, None], self.exponent + exponent)

    def log_growth(self) -> Float[Array, "*N"]:
        """The natural logarithm of the growth of a random vector, in the root mean square over all directions:
        `log(|2^exponent P|_F / sqrt(D))`. Zero for rotations; within `log(D) / 2` of the spectral norm's."""
        mean_square = jnp.sum(self.P**2, axis=(-2, -1)) / self.P.shape[-1]
        return 0.5 * jnp.log(mean_square) + self.exponent * jnp.log(jnp.array(2, self.P.dtype))


def compose(first: ScaledProduct, then: ScaledProduct) -> ScaledProduct:
    """First `first`, then `then`."""
    return ScaledProduct(matrix_matrix(then.P, first.P), first.exponent + then.exponent).normalised()


def products(transitions: DenseTransitions, scan: AbstractScan) -> ScaledProduct:
    """`A[i] ... A[0]` at every `i`.

    Cost: `N` products of matrices, in `log2 N` depth with an associative scan.
    """
    return scan.prefix(compose, ScaledProduct.make(transitions.A))


def product_by_segments(transitions: DenseTransitions, most: int) -> ScaledProduct:
    """`A[N-1] ... A[0]`, by way of the products of at most so many segments of equal length, which may lie on several
    devices.

    Cost: `N` products of matrices.
    """
    A = transitions.A
    num_steps, size, _ = A.shape
    length = -(-num_steps // most)
    count = -(-num_steps // length)
    identity = jnp.broadcast_to(jnp.eye(size, dtype=A.dtype), (count * length - num_steps, size, size))
    segments = jnp.concatenate([A, identity]).reshape(count, length, size, size)
    return _reduced(jax.vmap(lambda A: total_product(DenseTransitions(A)))(segments))


def _radix(size: int, dtype) -> int:
    """How many normalised matrices are multiplied between two normalisations: at most 16, while factors that each fall by
    all digits do not underflow, nor do their products overflow."""
    info = jnp.finfo(dtype)
    largest = min(-int(info.minexp) // info.nmant, int(info.maxexp) // (2 * size - 1).bit_length())
    return max(2, min(16, largest))


def total_product(transitions: DenseTransitions) -> ScaledProduct:
    """`A[N-1] ... A[0]`, by reduction: `N` products in few rounds, half the work of all of them."""
    return _reduced(ScaledProduct.make(transitions.A))


def _reduced(product: ScaledProduct) -> ScaledProduct:
    most = _radix(product.P.shape[-1], product.P.dtype)
    while (count := product.exponent.shape[0]) > 1:
        even = count - count % most if count >= most else count
        P, exponent = product.P[:even], product.exponent[:even]
        radix = min(most, count)
        group = P[0::radix]
        for k in range(1, radix):
            group = matrix_matrix(P[k::radix], group)
        groups = ScaledProduct(group, jnp.sum(exponent.reshape(-1, radix), axis=1)).normalised()
        # The odd ones out are kept for the next round, at the end.
        product = ScaledProduct(
            jnp.concatenate([groups.P, product.P[even:]]), jnp.concatenate([groups.exponent, product.exponent[even:]])
        )
    return ScaledProduct(product.P[0], product.exponent[0])
