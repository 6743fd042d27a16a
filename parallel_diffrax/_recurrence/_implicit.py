"""The derivative of the solution of a recurrence, by the implicit function theorem."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from .._scan import AbstractScan, solve_bidiagonal
from ._jacobian import Dense
from ._recurrence import Recurrence


def _is_none(x):
    return x is None


def stop_gradient(tree):
    """`tree` without the tangents of its arrays."""
    return jtu.tree_map(lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def with_implicit_derivative(
    recurrence: Recurrence, y: Float[Array, " N D"], healthy: Bool[Array, " N"], scan: AbstractScan
) -> Float[Array, " N D"]:
    """`y` itself, with the derivative that the solution of `recurrence` has with respect to all that it depends on.

    From `r(y, theta) = 0`: `dy = L^{-1} (dr/dtheta) dtheta`, with the exact Jacobians, whatever approximation found `y`.
    Forward mode costs one scan, reverse mode one reverse scan, no iterations; memory `N D^2`. It nests to any order.

    **Arguments:**

    - `recurrence`: what `y` solves.
    - `y`: the solution, without tangents.
    - `healthy`: the steps that are finite; the others are given no derivative, and disturb none.
    - `scan`: how to evaluate the linear recurrences.

    Written with `jax.custom_jvp` and `lax.custom_linear_solve` rather than `optimistix.internal.implicit_jvp`, whose
    `lineax.linear_solve` raises on any non-finite cotangent: a loss that is NaN for one member of a batch would stop all.
    """
    return _attach(recurrence, stop_gradient(y), healthy, scan)


@eqx.filter_custom_jvp
def _attach(recurrence, y, healthy, scan):
    del recurrence, healthy, scan
    return y


@_attach.def_jvp
def _attach_jvp(primals, tangents):
    recurrence, y, healthy, scan = primals
    t_recurrence, *_ = tangents
    # The rule itself is differentiated for higher orders: there, `y` depends on `recurrence` again.
    y = _attach(recurrence, y, healthy, scan)

    _, transitions, _ = Dense().linearise(lambda y: (_guarded_residual(recurrence, y, healthy), None), y)

    constant, variable = eqx.partition(
        recurrence, jtu.tree_map(_is_none, t_recurrence, is_leaf=_is_none), is_leaf=_is_none
    )
    _, t_residual = jax.jvp(
        lambda variable: _guarded_residual(eqx.combine(variable, constant, is_leaf=_is_none), y, healthy),
        (variable,),
        (t_recurrence,),
    )
    t_residual = jnp.where(healthy[:, None], t_residual, 0)
    return y, solve_bidiagonal(transitions.where(healthy), t_residual, scan)


def _guarded_residual(recurrence, y, healthy):
    return jax.vmap(recurrence.step)(*recurrence.guard(y, healthy)) - y
