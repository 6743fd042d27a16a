"""The block bidiagonal system `L d = r`: as a `lineax` operator and solver, and as a differentiable function."""

from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Float

from ._abstract_scan import AbstractScan
from ._auto_scan import AutoScan
from ._shifts import shift
from ._transitions import AbstractTransitions, DenseTransitions


def _matvec(transitions: AbstractTransitions, d: Float[Array, " N D"]) -> Float[Array, " N D"]:
    return d - transitions.apply(shift(d))


def _transposed_matvec(transitions: AbstractTransitions, w: Float[Array, " N D"]) -> Float[Array, " N D"]:
    return w - transitions.reversed().apply(shift(w, -1))


def solve_bidiagonal(
    transitions: AbstractTransitions, r: Float[Array, " N D"], scan: AbstractScan = AutoScan()
) -> Float[Array, " N D"]:
    """Solves `L d = r` so that every derivative is again a scan.

    The tangent of the solution is `L^{-1} (dr + dA d[i-1])`, another forward scan; the cotangent is the reverse scan
    `L^{-T}`. Any order and mixture of `jvp`, `vjp` and `vmap` works, and none differentiates through a scan.

    **Arguments:**

    - `transitions`: `A`, differentiable.
    - `r`: the right-hand side, shape `(N, D)`, differentiable.
    - `scan`: how to evaluate.

    **Returns:** `d`, shape `(N, D)`. Unlike `lineax.linear_solve`, a non-finite value (in the primal, a tangent or a
    cotangent) is passed on and never raised, so that one failed member of a batch does not stop the others.
    """
    # `lax.custom_linear_solve` takes the derivative with respect to `A` from the matvec alone.
    constant = jtu.tree_map(lax.stop_gradient, transitions)
    return lax.custom_linear_solve(
        lambda d: _matvec(transitions, d),
        r,
        solve=lambda _, b: scan.solve(constant, b),
        transpose_solve=lambda _, b: scan.solve(constant, b, transpose=True),
    )


class BidiagonalOperator(lx.AbstractLinearOperator):
    """`L` (or `L^T`) as a `lineax` operator on arrays of shape `(N, D)`.

    **Arguments:**

    - `transitions`: `A`.
    - `transposed`: whether this is `L^T`.
    """

    transitions: AbstractTransitions
    transposed: bool = eqx.field(static=True, default=False)

    def mv(self, vector):
        return _transposed_matvec(self.transitions, vector) if self.transposed else _matvec(self.transitions, vector)

    def as_matrix(self):
        A = self.transitions.dense()
        steps, size, _ = A.shape
        index = np.arange(steps)
        blocks = jnp.zeros((steps, size, steps, size), A.dtype)
        blocks = blocks.at[index, :, index, :].set(jnp.eye(size, dtype=A.dtype))
        blocks = blocks.at[index[1:], :, index[:-1], :].set(-A[1:])
        matrix = blocks.reshape(steps * size, steps * size)
        return matrix.T if self.transposed else matrix

    def transpose(self):
        return BidiagonalOperator(self.transitions, not self.transposed)

    def in_structure(self):
        A = jax.eval_shape(self.transitions.dense)
        return jax.ShapeDtypeStruct(A.shape[:2], A.dtype)

    def out_structure(self):
        return self.in_structure()


@lx.linearise.register(BidiagonalOperator)
@lx.materialise.register(BidiagonalOperator)
@lx.conj.register(BidiagonalOperator)
def _(operator):
    return operator


@lx.diagonal.register(BidiagonalOperator)
def _(operator):
    structure = operator.in_structure()
    return jnp.ones(structure.shape, structure.dtype).reshape(-1)


@lx.has_unit_diagonal.register(BidiagonalOperator)
def _(operator):
    return True


@lx.is_lower_triangular.register(BidiagonalOperator)
def _(operator):
    return not operator.transposed


@lx.is_upper_triangular.register(BidiagonalOperator)
def _(operator):
    return operator.transposed


@lx.is_symmetric.register(BidiagonalOperator)
@lx.is_diagonal.register(BidiagonalOperator)
@lx.is_tridiagonal.register(BidiagonalOperator)
@lx.is_positive_semidefinite.register(BidiagonalOperator)
@lx.is_negative_semidefinite.register(BidiagonalOperator)
def _(operator):
    return False


def _probe_transitions(operator: lx.AbstractLinearOperator) -> AbstractTransitions:
    """`A` of any operator that is known to be `-L`, as the Jacobian of a recurrence's residual is, from `D` products.

    `-L` seeded with `e_k` at every step at once gives `A[i] e_k - e_k` at step `i`: the steps do not mix.
    """
    structure = operator.in_structure()
    if not isinstance(structure, jax.ShapeDtypeStruct) or len(structure.shape) != 2:
        raise ValueError(
            "`BidiagonalSolver` solves for one array of shape (steps, size), or with a `BidiagonalOperator`; got an "
            f"operator on {structure}. Ravel each step of the state to a vector."
        )
    seeds = jnp.eye(structure.shape[1], dtype=structure.dtype)
    columns = jax.vmap(lambda seed: operator.mv(jnp.broadcast_to(seed, structure.shape)), out_axes=-1)(seeds)
    return DenseTransitions(columns + seeds)


class _State(eqx.Module):
    transitions: AbstractTransitions
    transposed: bool = eqx.field(static=True)
    negated: bool = eqx.field(static=True)


class BidiagonalSolver(lx.AbstractLinearSolver):
    """Solves `L d = r` (or `L^T w = r`) as a `lineax` linear solver: a scan forwards, a reverse scan for the transpose.

    Given a [`lineax`](https://docs.kidger.site/lineax/) operator other than `BidiagonalOperator`, it takes it to be the
    Jacobian of a recurrence's residual `F[i](y[i-1]) - y[i]`, which is `-L`. That makes it the linear solver to give to
    `optimistix.ImplicitAdjoint` when `optimistix.root_find` is called on such a residual.

    **Arguments:**

    - `scan`: how to evaluate the recurrence.

    Cost: one scan; and `D` matrix-vector products for an operator that is not a `BidiagonalOperator`.
    """

    scan: AbstractScan = AutoScan()

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        if isinstance(operator, BidiagonalOperator):
            return _State(operator.transitions, operator.transposed, negated=False)
        return _State(_probe_transitions(operator), transposed=False, negated=True)

    def compute(self, state, vector, options):
        del options
        solution = self.scan.solve(state.transitions, vector, transpose=state.transposed)
        return (-solution if state.negated else solution), lx.RESULTS.successful, {}

    def transpose(self, state, options):
        return _State(state.transitions, not state.transposed, state.negated), options

    def conj(self, state, options):
        return state, options

    def assume_full_rank(self):
        return True
