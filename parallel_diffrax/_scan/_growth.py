"""Products of transitions without overflow or underflow, and their growth."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._abstract_scan import AbstractScan
from ._segments import split_segments
from ._transitions import DenseTransitions, matrix_matrix


def binary_exponent(x: Float[Array, "*N"]) -> Int[Array, "*N"]:
    """The exponents `e` with `2^e <= x < 2^(e+1)` of positive numbers; 0 where `x` is 0. They are read off the bits, since
    logarithms are not exact."""
    bits, mantissa, bias = _layout(x.dtype)
    exponent = (lax.bitcast_convert_type(x, bits) >> mantissa) - bias
    return jnp.where(x > 0, exponent, 0).astype(jnp.int32)


def power_of_two(exponent: Int[Array, "*N"], dtype) -> Float[Array, "*N"]:
    """`2^exponent`, exact within the range of the dtype's normal numbers."""
    bits, mantissa, bias = _layout(dtype)
    exponent = jnp.clip(exponent, 1 - bias, bias).astype(bits)
    return lax.bitcast_convert_type((exponent + bias) << mantissa, dtype)


def _layout(dtype):
    """The integer type of the same width, the number of mantissa bits, and the bias of the exponent."""
    info = jnp.finfo(dtype)
    bits = {16: jnp.int16, 32: jnp.int32, 64: jnp.int64}[info.bits]
    return bits, info.nmant, -int(info.minexp) + 1


def exponent_log(exponent: Int[Array, "*N"], dtype) -> Float[Array, "*N"]:
    """`log(2^exponent)`."""
    return exponent.astype(dtype) * jnp.log(jnp.array(2, dtype))


class ScaledProduct(eqx.Module):
    """The matrices `2^exponent P`, where the largest entry of `P` is about 1. Composition is associative, and exact in the
    exponents: they accumulate no rounding."""

    P: Float[Array, "*N D D"]
    exponent: Int[Array, "*N"]

    @classmethod
    def make(cls, P: Float[Array, "*N D D"]) -> "ScaledProduct":
        """The matrices `P`, not scaled yet."""
        return cls(P, jnp.zeros(P.shape[:-2], jnp.int32)).normalised()

    @classmethod
    def identity(cls, size: int, dtype) -> "ScaledProduct":
        """The empty product."""
        return cls(jnp.eye(size, dtype=dtype), jnp.array(0, jnp.int32))

    def normalised(self) -> "ScaledProduct":
        """The same matrices, with the largest entry of `P` about 1 again."""
        exponent = binary_exponent(jnp.max(jnp.abs(self.P), axis=(-2, -1)))
        return ScaledProduct(self.P * power_of_two(-exponent, self.P.dtype)[..., None, None], self.exponent + exponent)

    def log_growth(self) -> Float[Array, "*N"]:
        """The natural logarithm of the growth factor of a random vector, in the root mean square over all directions:
        `log(|2^exponent P|_F / sqrt(D))`. Zero for rotations. It differs from the logarithm of the spectral norm by at most
        `log(D) / 2`."""
        mean_square = jnp.sum(self.P**2, axis=(-2, -1)) / self.P.shape[-1]
        return 0.5 * jnp.log(mean_square) + exponent_log(self.exponent, self.P.dtype)


def compose(first: ScaledProduct, then: ScaledProduct) -> ScaledProduct:
    """The product `then @ first`."""
    return ScaledProduct(matrix_matrix(then.P, first.P), first.exponent + then.exponent).normalised()


def products(transitions: DenseTransitions, scan: AbstractScan) -> ScaledProduct:
    """`A[i] ... A[0]` at every `i`."""
    return scan.prefix(compose, ScaledProduct.make(transitions.A))


def product_by_segments(transitions: DenseTransitions, most: int) -> ScaledProduct:
    """`A[N-1] ... A[0]`, from the products of at most `most` segments of equal length, which may be on different devices."""
    A = transitions.A
    segments = split_segments(A, most, fill=jnp.eye(A.shape[-1], dtype=A.dtype))
    return _reduced(jax.vmap(lambda A: total_product(DenseTransitions(A)))(segments))


def _radix(size: int, dtype) -> int:
    """The number of matrices multiplied between two normalisations, at most 16. It is so small that factors which each
    shrink by all digits of the dtype do not underflow, and products do not overflow."""
    info = jnp.finfo(dtype)
    largest = min(-int(info.minexp) // info.nmant, int(info.maxexp) // (2 * size - 1).bit_length())
    return max(2, min(16, largest))


def total_product(transitions: DenseTransitions) -> ScaledProduct:
    """`A[N-1] ... A[0]` by reduction: `N` matrix products in few rounds, half the work of all prefix products."""
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
        groups = ScaledProduct(group, jnp.sum(exponent.reshape(-1, radix), axis=1, dtype=exponent.dtype)).normalised()
        # The remaining matrices are kept at the end for the next round.
        product = ScaledProduct(
            jnp.concatenate([groups.P, product.P[even:]]), jnp.concatenate([groups.exponent, product.exponent[even:]])
        )
    return ScaledProduct(product.P[0], product.exponent[0])
