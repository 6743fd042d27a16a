"""The derivative of the solution of a recurrence, by the implicit function theorem."""

import functools

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Inexact

from .._scan import AbstractScan, solve_bidiagonal
from ._jacobian import AbstractJacobian, Dense
from ._matrix_free import solve_matrix_free
from ._recurrence import Recurrence


# Up to this size the Jacobians of a derivative are written down, whatever approximation found the solution.
_LARGEST_DENSE_SIZE = 64


def _is_none(x):
    return x is None


def stop_gradient(tree):
    """`tree` without the tangents of its arrays."""
    return jtu.tree_map(lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def nan_derivative_unless(
    valid: Bool[Array, "..."], x: Inexact[Array, "..."], even_if_unused: bool = False
) -> Inexact[Array, "..."]:
    """`x`, with the derivative NaN where it is not `valid`.

    **Arguments:**

    - `valid`: broadcasts against `x`.
    - `x`: the array.
    - `even_if_unused`: whether reverse mode makes cotangents NaN that are exactly zero. Otherwise they stay zero: what a
        window that was rejected by a step-size controller returned is not used, and must not make the derivatives of the
        accepted windows NaN.
    """
    return _attach_nan(even_if_unused, x, valid)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attach_nan(even_if_unused, x, valid):
    del even_if_unused, valid
    return x


@_attach_nan.defjvp
def _attach_nan_jvp(even_if_unused, primals, tangents):
    return _attach_nan(even_if_unused, *primals), _nan_unless(primals[1], tangents[0], even_if_unused)


def _nan_unless(valid, tangent, even_if_unused=False):
    """The identity where `valid`, else NaN, as a linear map."""

    def transposed(_, cotangent):
        unused = False if even_if_unused else cotangent == 0
        return jnp.where(valid | unused, cotangent, jnp.nan)

    # The one linear map of JAX whose transpose can be given.
    return lax.custom_linear_solve(
        lambda t: t, tangent, solve=lambda _, t: jnp.where(valid, t, jnp.nan), transpose_solve=transposed
    )


def with_implicit_derivative(
    recurrence: Recurrence,
    y: Float[Array, " N D"],
    finite: Bool[Array, " N"],
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
    - `healthy`: the steps that are finite and solved. The derivative of the others is NaN; what does not depend on them is
        not disturbed.
    - `jacobian`: the approximation with which `y` was found.
    - `scan`: how to evaluate the linear recurrences.

    Written with `jax.custom_jvp` and `lax.custom_linear_solve` rather than `optimistix.internal.implicit_jvp`, whose
    `lineax.linear_solve` raises on any non-finite cotangent: a loss that is NaN for one member of a batch would stop all.
    """
    return _attach(recurrence, stop_gradient(y), finite, jacobian, scan)


@eqx.filter_custom_jvp
def _attach(recurrence, y, finite, jacobian, scan):
    del recurrence, finite, jacobian, scan
    return y


@_attach.def_jvp
def _attach_jvp(primals, tangents):
    recurrence, y, finite, jacobian, scan = primals
    t_recurrence, *_ = tangents
    # The rule itself is differentiated for higher orders: there, `y` depends on `recurrence` again.
    y = _attach(recurrence, y, finite, jacobian, scan)

    constant, variable = eqx.partition(
        recurrence, jtu.tree_map(_is_none, t_recurrence, is_leaf=_is_none), is_leaf=_is_none
    )
    _, t_residual = jax.jvp(
        lambda variable: _guarded_residual(eqx.combine(variable, constant, is_leaf=_is_none), y, finite),
        (variable,),
        (t_recurrence,),
    )
    t_residual = jnp.where(finite[:, None], t_residual, 0)
    dense = jacobian.exact or y.shape[1] <= _LARGEST_DENSE_SIZE
    approximation = Dense() if dense else jacobian
    _, transitions, _ = approximation.linearise(lambda y: (_guarded_residual(recurrence, y, finite), None), y)
    transitions = transitions.where(finite)
    if dense:
        tangent = solve_bidiagonal(transitions, t_residual, scan)
    else:
        previous, inputs = recurrence.guard(y, finite)
        tangent = solve_matrix_free(recurrence.step, previous, inputs, transitions, finite, t_residual, scan)
    return y, _nan_unless(finite[:, None], tangent)


def _guarded_residual(recurrence, y, finite):
    return recurrence.steps(*recurrence.guard(y, finite), stop_gradient(y)) - y
