"""Gaussian elimination as a `lineax` solver, for the Newton iterations inside implicit steps."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float

from .._scan import eliminate


class _State(eqx.Module):
    matrix: Float[Array, " D D"]
    # The structures of the solution and of the right-hand side.
    structures: tuple = eqx.field(static=True)


class GaussianElimination(lx.AbstractLinearSolver):
    """Solves small square systems by elimination with partial pivoting, without LAPACK.

    Batched LAPACK calls inside one compiled program can deadlock on a CPU with few cores, and are slow on a GPU. Here a
    batch of systems takes `D` elementwise operations.

    **Arguments:** none.

    **Returns:** non-finite values for a singular system, which `lineax` reports.

    **Cost:** `D^3` work, depth `D`, `D^2` memory.

    **Raises:** `ValueError` for a system that is not square.
    """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        if operator.in_size() != operator.out_size():
            raise ValueError(
                f"`GaussianElimination` solves square systems; got {operator.out_size()} equations for "
                f"{operator.in_size()} unknowns."
            )
        structures = tuple(_hashable(s) for s in (operator.in_structure(), operator.out_structure()))
        return _State(operator.as_matrix(), structures)

    def compute(self, state, vector, options):
        del options
        leaves = [jnp.ravel(leaf).astype(state.matrix.dtype) for leaf in jtu.tree_leaves(vector)]
        solution = eliminate(state.matrix, jnp.concatenate(leaves)[:, None])[:, 0]
        return _unravel(solution, state.structures[0]), lx.RESULTS.successful, {}

    def transpose(self, state, options):
        return _State(state.matrix.T, state.structures[::-1]), options

    def conj(self, state, options):
        return _State(state.matrix.conj(), state.structures), options

    def assume_full_rank(self):
        return True


def _hashable(structure):
    leaves, treedef = jtu.tree_flatten(structure)
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves), treedef


def _unravel(vector, structure):
    leaves, treedef = structure
    sizes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in leaves]
    out, start = [], 0
    for leaf in sizes:
        out.append(vector[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return jtu.tree_unflatten(treedef, out)
