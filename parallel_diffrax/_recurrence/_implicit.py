"""The derivative of the solution of a recurrence, by the implicit function theorem."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from .._scan import AbstractScan, solve_bidiagonal
from ._jacobian import AbstractJacobian, Dense
from ._recurrence import Recurrence
from ._sweep import solve_by_products


# Up to this size the Jacobians of a derivative are written down, whatever approximation found the solution.
_LARGEST_DENSE_SIZE = 64


def _is_none(x):
    return x is None


def stop_gradient(tree):
    """`tree` without the tangents of its arrays."""
    return jtu.tree_map(lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def with_implicit_derivative(
    recurrence: Recurrence,
    y: Float[Array, " N D"],
    healthy: Bool[Array, " N"],
    jacobian: AbstractJacobian,
    scan: AbstractScan,
) -> Float[Array, " N D"]:
    """`y` itself, with the derivative that the solution of `recurrence` has with respect to all that it depends on.

    From `r(y, theta) = 0`: `dy = L^{-1} (dr/dtheta) dtheta`, with the exact Jacobians, whatever approximation found `y`.
    Forward mode costs one scan, reverse mode one reverse scan, no iterations; memory `N D^2`. It nests to any order.

    Where `y` was found with an approximate Jacobian and `D` is above 64, the Jacobians are not written down: products with
    them are iterated with, preconditioned by that approximation, or swept through in sequence (`_sweep.py`); memory `N D`.

    **Arguments:**

    - `recurrence`: what `y` solves.
    - `y`: the solution, without tangents.
    - `healthy`: the steps that are finite; the others are given no derivative, and disturb none.
    - `jacobian`: the approximation with which `y` was found.
    - `scan`: how to evaluate the linear recurrences.

    Written with `jax.custom_jvp` and `lax.custom_linear_solve` rather than `optimistix.internal.implicit_jvp`, whose
    `lineax.linear_solve` raises on any non-finite cotangent: a loss that is NaN for one member of a batch would stop all.
    """
    return _attach(recurrence, stop_gradient(y), healthy, jacobian, scan)


@eqx.filter_custom_jvp
def _attach(recurrence, y, healthy, jacobian, scan):
    del recurrence, healthy, jacobian, scan
    return y


@_attach.def_jvp
def _attach_jvp(primals, tangents):
    recurrence, y, healthy, jacobian, scan = primals
    t_recurrence, *_ = tangents
    # The rule itself is differentiated for higher orders: there, `y` depends on `recurrence` again.
    y = _attach(recurrence, y, healthy, jacobian, scan)

    constant, variable = eqx.partition(
        recurrence, jtu.tree_map(_is_none, t_recurrence, is_leaf=_is_none), is_leaf=_is_none
    )
    _, t_residual = jax.jvp(
        lambda variable: _guarded_residual(eqx.combine(variable, constant, is_leaf=_is_none), y, healthy),
        (variable,),
        (t_recurrence,),
    )
    t_residual = jnp.where(healthy[:, None], t_residual, 0)
    dense = jacobian.exact or y.shape[1] <= _LARGEST_DENSE_SIZE
    approximation = Dense() if dense else jacobian
    _, transitions, _ = approximation.linearise(lambda y: (_guarded_residual(recurrence, y, healthy), None), y)
    transitions = transitions.where(healthy)
    if dense:
        return y, solve_bidiagonal(transitions, t_residual, scan)
    previous, inputs = recurrence.guard(y, healthy)
    return y, solve_by_products(recurrence.step, previous, inputs, transitions, healthy, t_residual, scan)


def _guarded_residual(recurrence, y, healthy):
    return recurrence.steps(*recurrence.guard(y, healthy), stop_gradient(y)) - y
