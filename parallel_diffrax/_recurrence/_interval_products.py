"""The linear systems of derivatives by products with Jacobians in kernels, in intervals of steps. No Jacobian is stored."""

from collections.abc import Callable

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._kernels import kernel_loop, KernelLoop, wide_loop
from .._scan import AbstractScan, DenseTransitions, shift, split_segments, with_row
from ._stepper import MAX_KERNEL_COST
from ._tangents import stop_gradient, without_tangents


def products_in_intervals(
    step: Callable[[Float[Array, " D"], PyTree], Float[Array, " D"]],
    previous: Float[Array, " N D"],
    inputs: PyTree,
    finite: Bool[Array, " N"],
    r: Float[Array, " N D"],
    scan: AbstractScan,
    length: int,
    kernels: str,
) -> Float[Array, " N D"] | None:
    """Solves `d[i] = A[i] d[i-1] + r[i]`, or the transposed system in reverse mode, where `A[i]` is the Jacobian of `step`
    at `previous[i]` and `inputs[i]`. Steps that are not `finite` do not depend on the one before. `None` if the products of
    a step cannot be made in a kernel of the backend `kernels`.

    In each of `M` intervals of `length` steps, one thread for each column makes the product of the Jacobians, and one what
    `r` adds. A scan over the intervals gives the values between them, with which one thread goes through each interval
    again. It takes `2 N` products and `N D` products for the columns. Memory: a few `N D`.

    `step` with its arguments is differentiated to any order. A solution that does not satisfy the equations to half of the
    digits, of a kernel that was compiled wrongly, is NaN.
    """
    fixed = without_tangents(step, previous[0], jtu.tree_map(lambda x: x[0], inputs))
    # Nothing comes before the first step.
    finite = with_row(finite, 0, False)
    tables = stop_gradient((previous, inputs, finite))
    solver, transpose_solver = (_solver(fixed, tables, scan, length, kernels, transpose) for transpose in (False, True))
    if solver is None or transpose_solver is None:
        return None

    def matrix_vector(d):
        product = lambda y, x, v: jax.jvp(lambda y: step(y, x), (y,), (v,))[1]
        return d - jnp.where(finite[:, None], jax.vmap(product)(previous, inputs, shift(d)), 0)

    return lax.custom_linear_solve(matrix_vector, r, _checked(solver), _checked(transpose_solver))


def _checked(solver: Callable) -> Callable:
    """A solver whose solution is NaN where it does not satisfy the equations."""

    def solve(matvec, b):
        d = solver(b)
        size = jnp.max(jnp.where(jnp.isfinite(d), jnp.abs(d), 0), axis=0, keepdims=True)
        defect = jnp.abs(matvec(d) - b)
        # What is not finite was so before, or became so in XLA too.
        agrees = jnp.all((defect <= jnp.finfo(b.dtype).eps ** 0.5 * jnp.max(size)) | ~jnp.isfinite(defect))
        return jnp.where(agrees, d, jnp.nan)

    return solve


def _solver(step: Callable, tables: PyTree, scan: AbstractScan, length: int, kernels: str, transpose: bool):
    """The solution of a system for its right-hand side, in intervals; `None` if there are no kernels for it."""

    def after(y, x, finite, v, b):
        """The value after a step, and the one that it passes on. In reverse mode, a step comes after the later ones."""
        if not transpose:
            v = jnp.where(finite, jax.jvp(lambda y: step(y, x), (y,), (v,))[1], 0) + b
            return v, v
        w = v + b
        return w, jnp.where(finite, jax.vjp(lambda y: step(y, x), y)[1](w)[0], 0)

    def body(carry, entry):
        y, x, finite, b = entry
        value, passed = after(y, x, finite, carry["v"], carry["gain"] * b)
        k = carry["k"]
        following = jnp.where(k > 0, k - 1, -1) if transpose else jnp.where(k < length - 1, k + 1, -1)
        return {"v": passed, "gain": carry["gain"], "k": following}, value, k, following

    first = length - 1 if transpose else 0
    start = lambda v, gain: {"v": v, "gain": gain, "k": jnp.full((), first, jnp.int32)}
    b = tables[0]
    example = jtu.tree_map(lambda x: jax.ShapeDtypeStruct((length, *x.shape[1:]), x.dtype), (*tables, b))
    carry = start(b[0], jnp.ones((), b.dtype))

    def without_outputs(carry, entry):
        carry, _, slot, index = body(carry, entry)
        return carry, (), slot, index

    make = lambda body, num_outputs: kernel_loop(body, carry, example, num_outputs, MAX_KERNEL_COST, kernels, transpose)
    summing: KernelLoop | None = make(without_outputs, 0)
    storing = None if summing is None else make(body, length)
    if summing is None or storing is None:
        return None

    def cut(x, fill):
        # Adjacent threads read adjacent numbers.
        return jnp.swapaxes(split_segments(x, length=length, fill=fill), 0, 1)

    def solve(b):
        previous, inputs, finite = tables
        known = (*jtu.tree_map(lambda x: cut(x, "last"), (previous, inputs)), cut(finite, "zeros"))
        entries = (*known, cut(b, "zeros"))
        num_steps, size = b.shape
        num_intervals = entries[3].shape[1]
        index = jnp.full((), first, jnp.int32)
        vs = jnp.concatenate([jnp.eye(size, dtype=b.dtype), jnp.zeros((1, size), b.dtype)])
        gains = jnp.zeros(size + 1, b.dtype).at[size].set(1)
        over_intervals = lambda one, own: jax.vmap(one, (own, None, 1, None))
        carries = jax.vmap(start)(vs, gains)
        widen = lambda one: jax.vmap(over_intervals(one, None), (0, None, None, None))
        end, _ = wide_loop(summing)(widen)(carries, index, entries, summing.operands)
        columns, sums = jnp.moveaxis(end["v"][:size], 0, -1), end["v"][size]
        between = scan.linear(DenseTransitions(columns), sums, reverse=transpose)
        carries = jax.vmap(start)(shift(between, -1 if transpose else 1), jnp.ones(num_intervals, b.dtype))
        _, d = wide_loop(storing)(lambda one: over_intervals(one, 0))(carries, index, entries, storing.operands)
        return d.reshape(-1, size)[:num_steps]

    return solve
