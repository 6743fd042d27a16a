"""Damped linear recurrences: the parallel Kalman filter and smoother of a fixed statistical model.

For `A`, `r` and a damping `l[i] >= 0`, the model is

    d[i] = A[i] d[i-1] + r[i] + noise of covariance I,   d[-1] = 0,
    0    = d[i]              + noise of covariance I / l[i],

with independent noise. The *smoother's* mean of `d` is conditioned on all observations. It minimises

    |L d - r|^2 + sum_i l[i] |d[i]|^2,

so it solves `(L^T L + diag(l)) d = L^T r` and is the Levenberg-Marquardt step. The *filter's* mean of `d[i]` is conditioned
on the observations up to `i` only. Like `L^{-1} r`, it depends on the past only. For `l = 0` both are `L^{-1} r`.

Both work on the diagonal blocks of `A`, with products and solutions of `b x b` matrices; `b = 1` for diagonal `A`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._abstract_scan import AbstractScan
from ._elimination import eliminate
from ._segments import join_segments, split_segments
from ._shifts import shift, with_row
from ._transitions import AbstractTransitions, matrix_matrix, matrix_vector


# A sequence with at least this many numbers in `A` is filtered in segments.
_LARGEST_WHOLE = 2**22
_NUM_SEGMENTS = 32


def _transpose(A):
    return jnp.swapaxes(A, -1, -2)


def _eye_like(A):
    return jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape)


class KalmanElement(eqx.Module):
    """A segment of steps: the distribution of the state `d` after it and of its observations, given the state `d0` before.

    Given the observations, `d` is normal with mean `A d0 + b` and covariance `C`. As a function of `d0`, the likelihood of
    the observations is Gaussian with information matrix `J` and information vector `eta`. The composition of segments is
    associative. Leading axes are time and blocks.

    ??? cite "Reference"

        Särkkä and García-Fernández, "Temporal parallelization of Bayesian smoothers", arXiv 1905.13002 (2019).
    """

    A: Float[Array, "*N B b b"]
    b: Float[Array, "*N B b"]
    C: Float[Array, "*N B b b"]
    eta: Float[Array, "*N B b"]
    J: Float[Array, "*N B b b"]


def identity_like(element: KalmanElement) -> KalmanElement:
    """The empty segment: the unit of `compose`."""
    zero = jax.tree.map(jnp.zeros_like, element)
    return KalmanElement(_eye_like(element.A), zero.b, zero.C, zero.eta, zero.J)


def compose(first: KalmanElement, then: KalmanElement) -> KalmanElement:
    """The segment that consists of `first` and `then`."""
    # M = (I + C1 J2)^-1 is well-posed for all covariances C1 and information matrices J2, also singular ones.
    mean, size = first.b + matrix_vector(first.C, then.eta), first.C.shape[-1]
    matrix = _eye_like(first.C) + matrix_matrix(first.C, then.J)
    solved = eliminate(matrix, jnp.concatenate([first.A, mean[..., None], first.C], axis=-1))
    MA, Mb, MC = solved[..., :size], solved[..., size], solved[..., size + 1 :]
    # The other direction needs M^T = (I + J2 C1)^-1, and J2 M = M^T J2.
    surprise = then.eta - matrix_vector(then.J, first.b)
    # M^T s = s - J2 M C1 s needs no second elimination.
    weighed = surprise - matrix_vector(then.J, matrix_vector(MC, surprise))
    C = matrix_matrix(matrix_matrix(then.A, MC), _transpose(then.A)) + then.C
    J = matrix_matrix(_transpose(first.A), matrix_matrix(then.J, MA)) + first.J
    return KalmanElement(
        A=matrix_matrix(then.A, MA),
        b=matrix_vector(then.A, Mb) + then.b,
        # Rounding must not make covariances asymmetric: the asymmetric part grows.
        C=(C + _transpose(C)) / 2,
        eta=matrix_vector(_transpose(first.A), weighed) + first.eta,
        J=(J + _transpose(J)) / 2,
    )


def kalman_elements(A: Float[Array, "N B b b"], r: Float[Array, "N B b"], damping: Float[Array, " N"]) -> KalmanElement:
    """The elements of the single steps. A sequence starts from the known state zero, so `A[0]` must be zero."""
    # The gain of an observation of a state with covariance I.
    gain = (damping / (1 + damping))[:, None, None]
    rest = (1 / (1 + damping))[:, None, None]
    return KalmanElement(
        A=rest[..., None] * A,
        b=rest * r,
        C=rest[..., None] * _eye_like(A),
        eta=-gain * matrix_vector(_transpose(A), r),
        J=gain[..., None] * matrix_matrix(_transpose(A), A),
    )


def kalman_filter(
    transitions: AbstractTransitions, r: Float[Array, " N D"], damping: Float[Array, " N"], scan: AbstractScan
) -> tuple[Float[Array, " N D"], Float[Array, " N B b b"]]:
    """The means of the filter for `A`, `r` and the damping `l`, and their covariances in blocks. `A[0]` is never read.

    Long sequences are filtered in 32 segments, one after the other. One segment is then large enough to keep a device
    busy, and only its elements are in memory besides `A`, `r` and the result.

    The compositions take about `8 D b^2` multiplications per step. Memory is about three times the elements, which are
    `N D (3 b + 2)` numbers; a tenth of it if `A` has 2^22 numbers or more.
    """
    with jax.named_scope("kalman_filter"):
        A, b = transitions.blocks(), transitions.split(r)
        A = with_row(A, 0, 0)
        count = _NUM_SEGMENTS if A.size >= _LARGEST_WHOLE else 1
        mean, covariance = _filter_in_segments(A, b, damping, scan, count)
        return transitions.join(mean), covariance


def _filter_in_segments(A, r, damping, scan, count):
    """The means and covariances, computed in `count` segments one after the other."""
    if count == 1:
        product = scan.prefix(compose, kalman_elements(A, r, damping))
        return product.b, product.C

    def body(before, segment):
        product = scan.prefix(compose, kalman_elements(*segment))
        product = compose(jax.tree.map(lambda x, like: jnp.broadcast_to(x, like.shape), before, product), product)
        last = jax.tree.map(lambda x: x[-1:], product)
        return last, (product.b, product.C)

    empty = identity_like(jax.tree.map(lambda x: x[:1], KalmanElement(A, r, A, r, A)))
    _, results = jax.lax.scan(body, empty, jax.tree.map(lambda x: split_segments(x, count), (A, r, damping)))
    return jax.tree.map(lambda x: join_segments(x, A.shape[0]), results)


def _compose_affine(first, then):
    (E1, g1), (E2, g2) = first, then
    return matrix_matrix(E2, E1), matrix_vector(E2, g1) + g2


def kalman_smoother(
    transitions: AbstractTransitions, r: Float[Array, " N D"], damping: Float[Array, " N"], scan: AbstractScan
) -> Float[Array, " N D"]:
    """The means of the smoother, which solve `(L^T L + diag(l)) d = L^T r`, by the filter and one reverse affine scan."""
    mean, P = kalman_filter(transitions, r, damping, scan)
    with jax.named_scope("kalman_smoother"):
        # The coefficients of the next step. They are zero after the last step, which leaves its mean unchanged.
        m, A, b = transitions.split(mean), shift(transitions.blocks(), -1), shift(transitions.split(r), -1)
        # s[i] = m[i] + E (s[i+1] - A[i+1] m[i] - r[i+1]) with the gain E = P A^T (A P A^T + I)^-1.
        AP = matrix_matrix(A, P)
        E = _transpose(eliminate(matrix_matrix(AP, _transpose(A)) + _eye_like(A), AP))
        g = m - matrix_vector(E, matrix_vector(A, m) + b)
        return transitions.join(scan.prefix(_compose_affine, (E, g), reverse=True)[1])
