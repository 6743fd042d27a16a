"""Gaussian elimination as a `lineax` solver, for the Newton iterations inside implicit steps."""

import itertools

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float

from .._scan import eliminate


class _State(eqx.Module):
    matrix: Float[Array, " D D"]
    # The leaves and the tree structure of the solution and of the right-hand side.
    structures: tuple = eqx.field(static=True)


class GaussianElimination(lx.AbstractLinearSolver):
    """Solves small square systems by elimination with partial pivoting, in `D` elementwise operations on a batch of systems.

    Batched LAPACK calls inside one compiled program can deadlock on a CPU with few cores, and are slow on a GPU. A singular
    system gives non-finite values, which `lineax` reports. A system that is not square raises `ValueError`.
    """

    def init(self, operator: lx.AbstractLinearOperator, options):
        del options
        if operator.in_size() != operator.out_size():
            raise ValueError(
                f"`GaussianElimination` solves square systems; got {operator.out_size()} equations for "
                f"{operator.in_size()} unknowns."
            )
        structures = map(jtu.tree_flatten, (operator.in_structure(), operator.out_structure()))
        return _State(operator.as_matrix(), tuple((tuple(leaves), treedef) for leaves, treedef in structures))

    def compute(self, state, vector, options):
        del options
        rhs = [jnp.ravel(leaf).astype(state.matrix.dtype) for leaf in jtu.tree_leaves(vector)]
        solution = eliminate(state.matrix, jnp.concatenate(rhs)[:, None])[:, 0]
        leaves, treedef = state.structures[0]
        parts = jnp.split(solution, list(itertools.accumulate(leaf.size for leaf in leaves))[:-1])
        leaves = [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves)]
        return jtu.tree_unflatten(treedef, leaves), lx.RESULTS.successful, {}

    def transpose(self, state, options):
        return _State(state.matrix.T, state.structures[::-1]), options

    def conj(self, state, options):
        return _State(state.matrix.conj(), state.structures), options

    def assume_full_rank(self):
        return True
