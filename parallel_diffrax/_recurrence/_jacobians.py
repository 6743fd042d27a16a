"""What takes the place of the Jacobians `A[i]` of the steps in an iteration."""

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt32

from .._scan import (
    AbstractTransitions,
    BlockDiagonalTransitions,
    check_instance,
    check_integer,
    DenseTransitions,
    DiagonalTransitions,
    preceded_by,
    ScalarTransitions,
    ZeroTransitions,
)


Residual = Callable[[Float[Array, " N D"]], tuple[Float[Array, " N D"], PyTree]]


class AbstractJacobian(eqx.Module):
    """An approximation of `A[i] = dF[i]/dy` at `y[i-1]` in the linearised residual `r[i](y) = F[i](y[i-1]) - y[i]`.

    It uses products of the residual's Jacobian with vectors, never the steps themselves. A residual that went through
    `optimistix.root_find` therefore works too.

    `exact` says whether the Jacobian is exact. If so, the last update bounds the error; if not, the root finder measures the
    rate of convergence. `needs_products` says whether it needs products, and so a residual with derivatives in forward mode.
    """

    exact: ClassVar[bool] = False
    needs_products: ClassVar[bool] = True

    @abc.abstractmethod
    def linearise(
        self, residual: Residual, y: Float[Array, " N D"]
    ) -> tuple[Float[Array, " N D"], AbstractTransitions, PyTree]:
        """Evaluates the residual at `y` and its transitions in one pass.

        **Arguments:** `residual`, which maps `y` of shape `(N, D)` to the residual of the same shape and an auxiliary
        output; the states `y`.

        **Returns:** the residual, the transitions (approximate or exact), the auxiliary output.
        """


def residual_and_product(
    residual: Residual, y: Float[Array, " N D"]
) -> tuple[Float[Array, " N D"], Callable[[Float[Array, " N D"]], Float[Array, " N D"]], PyTree]:
    """The residual, the function `v -> (A[i] v[i-1])[i]` with zero before the first step, and the auxiliary output. The
    Jacobian `J` of the residual of any recurrence satisfies `(J v)[i] = A[i] v[i-1] - v[i]`."""
    r, tangent, aux = jax.linearize(residual, y, has_aux=True)
    return r, lambda v: tangent(v) + v, aux


# Up to this size, the products with the Jacobian are unrolled. For larger states they are a loop.
_LARGEST_UNROLLED_SIZE = 4


def jacobian_entries(
    product: Callable[[Float[Array, " N D"]], Float[Array, " N D"]],
    y: Float[Array, " N D"],
    columns: Int[Array, " D b"],
) -> Float[Array, " N D b"]:
    """The entries `A[i][j, columns[j, l]]` at `[i, j, l]`, from `D` products, without an array of `N D^2` numbers. The
    product with `e_k` at every step is the `k`-th column of all `A[i]`. Its entry in row `j` is kept if `columns[j]`
    contains `k`."""
    size = y.shape[1]

    def add(k, total):
        seed = jnp.broadcast_to(jnp.arange(size) == k, y.shape).astype(y.dtype)
        return total + jnp.where((columns == k)[None], product(seed)[:, :, None], 0)

    total = jnp.zeros((*y.shape, columns.shape[1]), y.dtype)
    if size > _LARGEST_UNROLLED_SIZE:
        return jax.lax.fori_loop(0, size, add, total)
    for k in range(size):
        total = add(k, total)
    return total


class Dense(AbstractJacobian):
    """The full Jacobian of every step.

    Use it for small states. `ParallelNewton(jacobian=Dense())` is Newton's method (DEER), which converges quadratically.

    The Jacobian `J` of the residual is block bidiagonal. The product with `e_k` at every step therefore gives the `k`-th
    column of all `A[i]` at once: `(J e_k)[i] = A[i] e_k - e_k`.

    **Cost:** per iteration: `D` Jacobian-vector products of a step, and `D^3` multiplications a step for the scan; memory
    `N D^2`.

    ??? cite "Reference"

        Lim, Zhu, Selfridge, Kasim, "Parallelizing non-linear sequential models over the sequence length", ICLR 2024,
        arXiv 2309.12252.
    """

    exact: ClassVar[bool] = True

    def linearise(self, residual, y):
        seeds = jnp.eye(y.shape[1], dtype=y.dtype)
        column = lambda seed: jax.jvp(residual, (y,), (jnp.broadcast_to(seed, y.shape),), has_aux=True)
        r, columns, aux = jax.vmap(column, out_axes=(None, -1, None))(seeds)
        return r, DenseTransitions(columns + seeds[None]), aux


class Diagonal(AbstractJacobian):
    """The exact diagonal of every step's Jacobian.

    Use it for large states whose components depend mostly on themselves. `ParallelNewton(jacobian=Diagonal())` is
    quasi-DEER, which converges linearly. `Hutchinson` estimates the same diagonal from a fixed number of products.

    **Cost:** per iteration: `D` Jacobian-vector products of a step, one after the other, and `D` multiplications a step for
    the scan; memory of a few `N D`.

    ??? cite "Reference"

        Gonzalez, Warrington, Smith, Linderman, "Towards scalable and stable parallelization of nonlinear RNNs",
        NeurIPS 2024, arXiv 2407.19115.
    """

    def linearise(self, residual, y):
        r, product, aux = residual_and_product(residual, y)
        entries = jacobian_entries(product, y, jnp.arange(y.shape[1])[:, None])
        return r, DiagonalTransitions(entries[..., 0]), aux


class Hutchinson(AbstractJacobian):
    """The diagonal of every step's Jacobian by Hutchinson's estimator: the mean over probes of `v * (A[i] v)`, with signs
    `v` drawn independently for every step.

    Use it for states so large that the `D` products of `Diagonal` take too long. The estimate is unbiased. Its variance is
    the sum of squares of the off-diagonal entries of each row, divided by the number of probes. It is exact for a diagonal
    Jacobian. All iterations use the same probes: a fixed iteration converges.

    **Arguments:** `num_probes`, the number of probes, at least 1; `key`, a `jax.random.key` from which they are drawn.

    **Cost:** per iteration: `num_probes` Jacobian-vector products of a step, one after the other, and `D` multiplications a
    step for the scan; memory of a few `N D`.

    **Raises:** `TypeError` or `ValueError` for a `num_probes` that is not a positive integer.

    ??? cite "References"

        Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines", 1990.

        Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", 2007.
    """

    num_probes: int = eqx.field(static=True)
    key: PRNGKeyArray | UInt32[Array, "2"]

    def __check_init__(self):
        check_integer("Hutchinson", "num_probes", self.num_probes, "the number of probes")

    def linearise(self, residual, y):
        r, product, aux = residual_and_product(residual, y)

        def add(k, total):
            probe = jax.random.rademacher(jax.random.fold_in(self.key, k), y.shape, y.dtype)
            # The product at step `i` is `A[i]` times the probe at step `i-1`.
            return total + preceded_by(probe[0], probe) * product(probe)

        total = jax.lax.fori_loop(0, self.num_probes, add, jnp.zeros_like(y))
        return r, DiagonalTransitions(total / self.num_probes), aux


class BlockDiagonal(AbstractJacobian):
    """Exact diagonal blocks of every step's Jacobian: a method between `Diagonal` and `Dense`.

    Use it for components that couple in small groups. In a second-order system, the block of each position with its velocity
    contains the oscillation, which a diagonal does not.

    **Arguments:** `groups`, the components (of the raveled state) that each block couples: a sequence of sequences of equal
    length that together contain every component once. `BlockDiagonal.of_consecutive` and `BlockDiagonal.of_parts` make
    common ones.

    **Cost:** per iteration, for blocks of size `b`: `D` Jacobian-vector products of a step, one after the other, and `D b^2`
    multiplications a step for the scan; memory `N D b`.

    **Raises:** `ValueError` for groups of unequal length, or that contain a component twice or not at all. In a solve, also
    if they do not fit the size of the state.

    ??? cite "Reference"

        Gonzalez, "Parallel Newton methods", arXiv 2603.16850 (2026).
    """

    groups: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    def __init__(self, groups: Sequence[Sequence[int]]):
        self.groups = tuple(tuple(int(k) for k in group) for group in groups)
        flat = sorted(k for group in self.groups for k in group)
        if len(flat) == 0 or len({len(g) for g in self.groups}) != 1 or flat != list(range(len(flat))):
            raise ValueError(
                f"`BlockDiagonal({groups!r})`: expected groups of equal length that together name each of the "
                "components 0 .. D-1 once, for example `[(0, 2), (1, 3)]` for two positions followed by their velocities."
            )

    @classmethod
    def of_consecutive(cls, size: int, block: int) -> "BlockDiagonal":
        """Blocks of `block` neighbouring components of a state of `size` numbers: `(0, 1), (2, 3), ...`."""
        _check_divides("of_consecutive", size, block)
        return cls(np.arange(size).reshape(-1, block).tolist())

    @classmethod
    def of_parts(cls, size: int, parts: int = 2) -> "BlockDiagonal":
        """Blocks for a state of `size` numbers that consists of `parts` vectors. Block `k` has the `k`-th entry of each.
        With two parts, it couples position `k` and velocity `k` of `(positions, velocities)`."""
        _check_divides("of_parts", size, parts)
        return cls(np.arange(size).reshape(parts, -1).T.tolist())

    def linearise(self, residual, y):
        groups = np.asarray(self.groups)
        if groups.size != y.shape[1]:
            raise ValueError(
                f"`BlockDiagonal(groups)` has {groups.size} components, but the state has {y.shape[1]} numbers."
            )
        r, product, aux = residual_and_product(residual, y)
        columns = np.empty((groups.size, groups.shape[1]), int)
        columns[groups] = groups[:, None, :]
        entries = jacobian_entries(product, y, jnp.asarray(columns))
        return r, BlockDiagonalTransitions(entries[:, groups], self.groups), aux


def _check_divides(name, size, count):
    if size < 1 or count < 1 or size % count != 0:
        raise ValueError(f"`BlockDiagonal.{name}({size}, {count})`: {count} must divide {size}.")


class Identity(AbstractJacobian):
    """`A[i] = I`.

    Use it for short times and small steps, without derivatives. `ParallelNewton(jacobian=Identity())` is Picard iteration:
    the new `y[i]` is the initial state plus the sum of all increments `F(y[l-1]) - y[l-1]`, `l <= i`, of the old iterate.

    **Cost:** per iteration: one evaluation of a step, and a cumulative sum; memory `N D`.

    ??? cite "Reference"

        Shih et al., "Parallel sampling of diffusion models", arXiv 2305.16317 (2023).
    """

    needs_products: ClassVar[bool] = False

    def linearise(self, residual, y):
        r, aux = residual(y)
        return r, ScalarTransitions(jnp.ones(y.shape[:1], y.dtype), y.shape[1]), aux


class Zero(AbstractJacobian):
    """`A[i] = 0`.

    Use it only for steps that forget the past within a few steps: information moves one step per iteration.
    `ParallelNewton(jacobian=Zero())` is Jacobi iteration, `y[i] <- F(y[i-1])` for all steps at once.

    **Cost:** per iteration: one evaluation of a step, no scan; memory `N D`.

    ??? cite "Reference"

        Song, Meng, Liao, Ermon, "Accelerating feedforward computation via parallel nonlinear equation solving", ICML
        2021, arXiv 2002.03629.
    """

    needs_products: ClassVar[bool] = False

    def linearise(self, residual, y):
        r, aux = residual(y)
        return r, ZeroTransitions(y.shape[0], y.shape[1], y.dtype), aux


class Scaled(AbstractJacobian):
    """`(1 - k) A[i]` for the `A` of another approximation.

    Use it if products of the `A` grow: a small `k` prevents overflow, at the price of linear convergence. The method lies
    between that of `base` (`k = 0`) and Jacobi iteration (`k = 1`).

    **Arguments:** `k`, the reduction, in `[0, 1]`; `base`, the approximation, by default `Dense()`.

    **Cost:** that of `base`.

    **Raises:** `TypeError` for a `base` of another kind, `ValueError` for a `k` out of range.

    ??? cite "Reference"

        Gonzalez, "Parallel Newton methods", arXiv 2603.16850 (2026).
    """

    k: float | Float[Array, ""]
    base: AbstractJacobian = Dense()

    def __check_init__(self):
        # Written so that NaN fails.
        if isinstance(self.k, (int, float)) and not 0 <= self.k <= 1:
            raise ValueError(f"`Scaled(k={self.k!r})`: expected a number between 0 and 1.")
        check_instance("Scaled", "base", self.base, AbstractJacobian, "Dense()")

    def linearise(self, residual, y):
        r, transitions, aux = self.base.linearise(residual, y)
        return r, transitions.scaled(jnp.asarray(1 - self.k, y.dtype)), aux


class Clipped(AbstractJacobian):
    """Another approximation, with the diagonal of every `A[i]` clipped to `[-limit, limit]`.

    Use it for unstable steps: with a diagonal `A` and `limit = 1`, products of the `A` cannot grow.

    **Arguments:** `base`, the approximation, by default `Diagonal()`; `limit`, the largest magnitude on the diagonal, by
    default 1.

    **Cost:** that of `base`.

    **Raises:** `TypeError` for a `base` of another kind, `ValueError` for a `limit` that is not positive.

    ??? cite "Reference"

        Gonzalez, Warrington, Smith, Linderman, "Towards scalable and stable parallelization of nonlinear RNNs",
        NeurIPS 2024, arXiv 2407.19115.
    """

    base: AbstractJacobian = Diagonal()
    limit: float = 1.0

    def __check_init__(self):
        check_instance("Clipped", "base", self.base, AbstractJacobian, "Diagonal()")
        if not self.limit > 0:
            raise ValueError(f"`Clipped(limit={self.limit!r})`: expected a positive number.")

    def linearise(self, residual, y):
        r, transitions, aux = self.base.linearise(residual, y)
        return r, transitions.clipped(self.limit), aux
