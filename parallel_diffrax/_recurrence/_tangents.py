"""Operations on tangents: remove them, or make them NaN."""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Inexact

from .._kernels import closed


_Tree = TypeVar("_Tree")


def stop_gradient(tree: _Tree) -> _Tree:
    """`tree` without the tangents of its arrays."""
    return jtu.tree_map(lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def with_axes_of(x: Inexact[Array, "..."], tree: _Tree) -> _Tree:
    """`tree`, in which every array has the axes of batches that `x` has. `jax.custom_jvp` needs them to be the same in the
    results of a function and of its rule."""
    either = jnp.any(x != x)
    return jtu.tree_map(lambda y: jnp.where(either, y, y) if eqx.is_array(y) else y, tree)


def nan_unless(valid: Bool[Array, "..."], x: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """`x` where it is `valid`, NaN elsewhere, in both parts of a complex number."""
    nan = complex(math.nan, math.nan) if jnp.issubdtype(x.dtype, jnp.complexfloating) else math.nan
    return jnp.where(valid, x, nan)


def without_tangents(fn: Callable, *examples) -> Callable:
    """`fn`, with arguments like the `examples`, without the tangents of the arrays that it closes over: for loops that no
    derivative may enter."""
    return stop_gradient(closed(fn, *examples))


def nan_derivative_unless(
    valid: Bool[Array, "..."], x: Inexact[Array, "..."], even_if_unused: bool = False
) -> Inexact[Array, "..."]:
    """`x` itself, with a derivative of NaN where it is not `valid` (of the rank of `x`, or a scalar).

    In reverse mode, cotangents that are exactly zero stay zero unless `even_if_unused`: the output of a window that a
    step-size controller rejected is unused, and must not make the derivatives of the accepted windows NaN.
    """
    return _attach_nan(even_if_unused, x, valid)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attach_nan(even_if_unused, x, valid):
    del even_if_unused, valid
    return x


@_attach_nan.defjvp
def _attach_nan_jvp(even_if_unused, primals, tangents):
    return _attach_nan(even_if_unused, *primals), nan_tangent_unless(primals[1], tangents[0], even_if_unused)


def nan_tangent_unless(valid, tangent, even_if_unused=False):
    """A linear map: the identity where `valid`, NaN elsewhere. See `nan_derivative_unless`."""
    # Of JAX's linear maps, only this one accepts a transpose.
    return lax.custom_linear_solve(
        lambda t: t,
        tangent,
        solve=lambda _, t: nan_unless(valid, t),
        transpose_solve=lambda _, c: nan_cotangent_unless(valid, c, even_if_unused),
    )


def nan_cotangent_unless(valid, cotangent, even_if_unused=False):
    """The transpose of `nan_tangent_unless`, but cotangents of zero stay zero unless `even_if_unused`."""
    unused = False if even_if_unused else cotangent == 0
    return nan_unless(valid | unused, cotangent)
