"""The solution of the block bidiagonal system `L d = r`: a differentiable function, and a `lineax` solver."""

from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float

from ._abstract_scan import AbstractScan
from ._auto_scan import AutoScan
from ._shifts import shift
from ._transitions import AbstractTransitions, DenseTransitions


def solve_bidiagonal(
    transitions: AbstractTransitions, r: Float[Array, " N D"], scan: AbstractScan = AutoScan()
) -> Float[Array, " N D"]:
    """Solves `L d = r`. Every derivative is another scan: the tangent is the forward scan `L^{-1} (dr + dA d[i-1])`, the
    cotangent the reverse scan `L^{-T}`. `jvp`, `vjp` and `vmap` work in any order and mixture, and none of them
    differentiates through a scan.

    Unlike `lineax.linear_solve`, this passes on non-finite values (in the primal, a tangent or a cotangent) and never
    raises, so one failed member of a batch does not stop the others.
    """
    # `lax.custom_linear_solve` takes the derivative with respect to `A` from the matvec alone.
    constant = jtu.tree_map(lax.stop_gradient, transitions)
    return lax.custom_linear_solve(
        lambda d: d - transitions.apply(shift(d)),
        r,
        solve=lambda _, b: scan.solve(constant, b),
        transpose_solve=lambda _, b: scan.solve(constant, b, transpose=True),
    )


def _probe_transitions(operator: lx.AbstractLinearOperator) -> AbstractTransitions:
    """`A` of an operator that equals `-L`, such as the Jacobian of a recurrence's residual, from `D` products.

    `-L` applied to `e_k` at every step at once gives `A[i] e_k - e_k` at step `i`: each step depends on one seed only.
    """
    structure = operator.in_structure()
    if not isinstance(structure, jax.ShapeDtypeStruct) or len(structure.shape) != 2:
        raise ValueError(
            f"`BidiagonalSolver`: expected an operator on one array of shape (steps, size), got one on {structure}. "
            "Ravel the state of each step to a vector."
        )
    seeds = jnp.eye(structure.shape[1], dtype=structure.dtype)
    columns = jax.vmap(lambda seed: operator.mv(jnp.broadcast_to(seed, structure.shape)), out_axes=-1)(seeds)
    return DenseTransitions(columns + seeds[None])


class _State(eqx.Module):
    transitions: AbstractTransitions
    transposed: bool = eqx.field(static=True)


class BidiagonalSolver(lx.AbstractLinearSolver):
    """A [`lineax`](https://docs.kidger.site/lineax/) linear solver for the Jacobian of a recurrence's residual.

    Use it in `optimistix.ImplicitAdjoint` when you call `optimistix.root_find` on a residual `F[i](y[i-1]) - y[i]`. Its
    Jacobian is `-L`, which is solved by one scan:

        d[i] = A[i] d[i-1] - r[i],   d[-1] = 0,   i = 0 .. N-1

    **Arguments:** `scan`, an `AbstractScan` that evaluates the recurrence.

    **Returns:** used as `lineax.linear_solve(operator, r, solver)`: `d`, shape `(N, D)` as `r`.

    **Cost:** `D` matrix-vector products, and one scan; a reverse scan for the transpose.

    **Raises:** `ValueError` for an operator on anything but one array of shape `(N, D)`.
    """

    scan: AbstractScan = AutoScan()

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        return _State(_probe_transitions(operator), transposed=False)

    def compute(self, state, vector, options):
        del options
        return -self.scan.solve(state.transitions, vector, transpose=state.transposed), lx.RESULTS.successful, {}

    def transpose(self, state, options):
        return _State(state.transitions, not state.transposed), options

    def conj(self, state, options):
        return state, options

    def assume_full_rank(self):
        return True
