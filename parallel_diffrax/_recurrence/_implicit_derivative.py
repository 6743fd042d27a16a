"""The derivative of the solution of a recurrence, by the implicit function theorem."""

import dataclasses

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from .._scan import AbstractScan, solve_bidiagonal
from ._cost import derivative_interval_length, supports_intervals
from ._interval_products import products_in_intervals
from ._jacobians import AbstractJacobian, Dense
from ._matrix_free import solve_matrix_free
from ._recurrence import Recurrence
from ._tangents import nan_cotangent_unless, nan_tangent_unless, stop_gradient


# For states up to this size, derivatives use dense Jacobians even if an approximation found the solution.
_LARGEST_DENSE_SIZE = 64


def with_implicit_derivative(
    recurrence: Recurrence,
    y: Float[Array, " N D"],
    finite: Bool[Array, " N"],
    jacobian: AbstractJacobian,
    scan: AbstractScan,
    kernels: str = "off",
) -> Float[Array, " N D"]:
    """`y` itself, with the derivative of the solution of `recurrence` in everything that it depends on, to any order.

    From `r(y, theta) = 0` follows `dy = L^{-1} (dr/dtheta) dtheta`, with the exact Jacobians, whichever `jacobian` found
    `y`. The derivative is NaN at the steps that are not `finite`; derivatives that do not depend on them are unaffected. It
    takes one scan, in reverse mode one reverse scan, no iterations, and memory `N D^2`. No Jacobian is stored, and memory is
    `N D`, if kernels of the backend `kernels` make products of a step (`products_in_intervals`), and if `jacobian` is
    approximate and `D` is above 64 (`solve_matrix_free`).

    `jax.custom_jvp` and `lax.custom_linear_solve` replace `optimistix.internal.implicit_jvp`, whose `lineax.linear_solve`
    raises on any cotangent that is not finite. A loss that is NaN for one member of a batch would then stop all of them.
    """
    return _attach(recurrence, stop_gradient(y), finite, jacobian, scan, kernels)


@eqx.filter_custom_jvp
def _attach(recurrence, y, finite, jacobian, scan, kernels):
    del recurrence, finite, jacobian, scan, kernels
    return y


@_attach.def_jvp
def _attach_jvp(primals, tangents):
    recurrence, y, finite, jacobian, scan, kernels = primals
    t_recurrence, *_ = tangents
    # For higher orders this rule is differentiated too, and there `y` depends on `recurrence` again.
    y = _attach(recurrence, y, finite, jacobian, scan, kernels)

    is_none = lambda x: x is None
    constant, variable = eqx.partition(
        recurrence, jtu.tree_map(is_none, t_recurrence, is_leaf=is_none), is_leaf=is_none
    )
    residual = lambda variable: _guarded_residual(eqx.combine(variable, constant, is_leaf=is_none), y, finite)
    _, t_residual = jax.jvp(residual, (variable,), (t_recurrence,))
    # A step that is not finite, even the first, depends on everything, with derivatives that are NaN.
    leaves = [t for t in jtu.tree_leaves(t_recurrence) if eqx.is_inexact_array(t)]
    everything = sum((jnp.sum(t).astype(y.dtype) for t in leaves), jnp.zeros((), y.dtype))
    blocked = nan_tangent_unless(finite[:, None], jnp.broadcast_to(everything, y.shape))
    t_residual = jnp.where(finite[:, None], t_residual, blocked)
    dense = jacobian.exact or y.shape[1] <= _LARGEST_DENSE_SIZE
    step, (previous, inputs) = recurrence.step, recurrence.guard(y, finite)
    length, tangent = derivative_interval_length(*y.shape), None
    if dense and length > 1 and recurrence.stages is None and supports_intervals(scan, kernels):
        tangent = products_in_intervals(step, previous, inputs, finite, t_residual, scan, length, kernels)
    if tangent is None:
        residual_at = lambda y: (_guarded_residual(recurrence, y, finite), None)
        _, transitions, _ = (Dense() if dense else jacobian).linearise(residual_at, y)
        transitions = transitions.where(finite)
        if dense:
            tangent = solve_bidiagonal(transitions, t_residual, scan)
        else:
            tangent = solve_matrix_free(step, previous, inputs, transitions, finite, t_residual, scan)
    return y, nan_tangent_unless(finite[:, None], tangent)


def _guarded_residual(recurrence, y, finite):
    return recurrence.step_all(*recurrence.guard(y, finite), stop_gradient(y)) - y


def with_reverse_derivative(
    recurrence: Recurrence, y: Float[Array, " N D"], finite: Bool[Array, " N"]
) -> Float[Array, " N D"]:
    """Like `with_implicit_derivative`, for steps that can be differentiated in reverse mode only.

    The cotangents `w[i] = A[i+1]^T w[i+1] + c[i]`, for cotangents `c` of `y`, are computed sequentially, by one
    vector-Jacobian product per step. Memory `N D`, and what the product of one step stores.
    """
    return _attach_reverse(recurrence, stop_gradient(y), finite)


@eqx.filter_custom_vjp
def _attach_reverse(recurrence, y, finite):
    del recurrence, finite
    return y


@_attach_reverse.def_fwd
def _attach_reverse_fwd(perturbed, recurrence, y, finite):
    del perturbed
    # For higher orders this rule is differentiated too, and there `y` depends on `recurrence` again.
    y = _attach_reverse(recurrence, y, finite)
    return y, y


@_attach_reverse.def_bwd
def _attach_reverse_bwd(y, cotangent, perturbed, recurrence, _, finite):
    del perturbed
    cotangent = nan_cotangent_unless(finite[:, None], cotangent)
    previous, inputs = recurrence.guard(y, finite)
    maps, others = eqx.partition(recurrence.map, eqx.is_inexact_array)

    def step(maps, y, x):
        return dataclasses.replace(recurrence, map=eqx.combine(maps, others)).step(y, x)

    def body(carry, element):
        w, total = carry
        y, x, finite, c = element
        variable, constant = eqx.partition(x, eqx.is_inexact_array)
        w = w + c
        product = jax.vjp(lambda maps, y, x: step(maps, y, eqx.combine(x, constant)), maps, y, variable)[1]
        # A step that is not finite hands on NaN to everything that it depends on.
        of_maps, of_y, of_x = jtu.tree_map(lambda x: jnp.where(finite, x, 0 * jnp.sum(w).astype(x.dtype)), product(w))
        return (of_y, jtu.tree_map(jnp.add, total, of_maps)), of_x

    zero = jtu.tree_map(jnp.zeros_like, (recurrence.init, maps))
    elements = (previous, inputs, finite, cotangent)
    (of_init, of_maps), of_inputs = lax.scan(body, zero, elements, reverse=True)
    nothing = jtu.tree_map(lambda _: None, recurrence)
    return dataclasses.replace(nothing, init=of_init, map=of_maps, inputs=of_inputs)
