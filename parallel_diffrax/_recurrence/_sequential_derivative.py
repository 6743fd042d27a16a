"""The derivative of steps that were made sequentially, of which only the leading ones count."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from .._kernels import indexed_loop, largest_member, on_cpu
from .._scan import preceded_by, row_at, shift
from ._recurrence import Recurrence
from ._tangents import stop_gradient


class LastState(eqx.Module):
    """The state `y` after `count` steps."""

    y: Float[Array, " D"]
    count: Int[Array, ""]


def with_sequential_derivative(
    recurrence: Recurrence, y: Float[Array, " N D"], outcome: Any, kernels: str
) -> tuple[Float[Array, " N D"], Any]:
    """The states `y` and the `outcome` of the first `outcome.count` steps of `recurrence` (a `LastState`, or another module
    with its fields), with the derivative of `y` and of `outcome.y`, the last state, in everything that they depend on, to
    any order. The derivative of states after the last is zero.

    Tangents are propagated step by step,

        dy[i] = A[i] dy[i-1] + (dF[i]/dtheta) dtheta,

    and cotangents in the opposite order, by one vector-Jacobian product per step:

        w[i] = A[i+1]^T w[i+1] + c[i],    dtheta = sum_i (dF[i]/dtheta)^T w[i].

    Both are loops over the `count` steps, however large `N` is. In a batch they make the steps of the longest member. No
    Jacobian is stored. Memory: the states. On a GPU the loop in reverse is one kernel, of the backend `kernels`, if the step
    is small.
    """
    return _attach(recurrence, *stop_gradient((y, outcome)), kernels)


@eqx.filter_custom_jvp
def _attach(recurrence, y, outcome, kernels):
    del recurrence, kernels
    return y, outcome


@_attach.def_jvp
def _attach_jvp(primals, tangents):
    recurrence, y, outcome, kernels = primals
    # For higher orders this rule is differentiated too, and there the states depend on `recurrence` again.
    y, outcome = _attach(recurrence, y, outcome, kernels)
    count = outcome.count
    # The tangents of the parts that are differentiated, `None` for all else.
    t_theta = _parts(tangents[0])
    constant, variable = variable_parts(_parts(recurrence), t_theta)
    steps = SequentialSweep(recurrence, constant, variable, recurrence.previous(y), count, kernels)
    # One linear system for the tangents of the parameters and of the states: JAX transposes its solution by a solver that
    # is given, and differentiates it further without looking into the solvers.
    zero = depends_on(t_theta, y.dtype)
    t_theta = jtu.tree_map(lambda x: x + zero.astype(x.dtype), t_theta)
    rhs = t_theta, jnp.broadcast_to(zero, y.shape)
    _, tangent = lax.custom_linear_solve(
        steps.system, rhs, lambda _, b: steps.forwards(*b), lambda _, c: steps.backwards(*c)
    )
    # Without steps, the last state is the initial one.
    start = jnp.zeros_like(outcome.y) if t_theta.init is None else t_theta.init
    end = jnp.where(count > 0, row_at(tangent, jnp.maximum(count - 1, 0)), start)
    zeros = jtu.tree_map(lambda x: jnp.zeros_like(x) if eqx.is_inexact_array(x) else None, outcome)
    return (y, outcome), (tangent, eqx.tree_at(lambda outcome: outcome.y, zeros, end))


def depends_on(tree: PyTree, dtype) -> Array:
    """A zero that depends on all arrays in `tree`.

    JAX transposes a linear solve only if every part of its right-hand side depends on tangents. In the branch of a loop,
    some are zeros that do not.
    """
    zeros = [jnp.sum(jnp.where(jnp.zeros_like(x, bool), x, 0)).real for x in jtu.tree_leaves(tree)]
    return sum((x.astype(dtype) for x in zeros), jnp.zeros((), dtype))


class Parts(NamedTuple):
    """What steps depend on, beside the state before: the initial state, the arrays in the map, the inputs. Or tangents or
    cotangents of it."""

    init: PyTree
    map: PyTree
    inputs: PyTree

    def inputs_at(self, k: Int[Array, ""]) -> PyTree:
        """The inputs of step `k`."""
        return jtu.tree_map(lambda x: x[k], self.inputs)


def _parts(recurrence: Recurrence) -> Parts:
    return Parts(recurrence.init, recurrence.map, recurrence.inputs)


def variable_parts(parts: Parts, tangents: Parts) -> tuple[Parts, Parts]:
    """The parts that are not differentiated, and those that have `tangents`, with `None` for all else."""
    constant = jtu.tree_map(is_none, tangents, is_leaf=is_none)
    return eqx.partition(parts, constant, is_leaf=is_none)


def is_none(x) -> bool:
    return x is None


class SequentialSweep:
    """The steps of a recurrence from known states, as functions of the `variable` parts `theta` and of the state before."""

    def __init__(
        self,
        recurrence: Recurrence,
        constant: Parts,
        variable: Parts,
        previous: Float[Array, " N D"],
        count: Int[Array, ""],
        kernels: str,
    ):
        self.recurrence, self.constant, self.variable = recurrence, constant, variable
        self.previous, self.count, self.kernels = previous, count, kernels

    def step_with(self, fixed: PyTree):
        """A step as a function of the variable part of the map, of the variable part of its inputs and of the state before.
        `fixed` is the other part of its inputs."""

        def step(map, x, y):
            map, x = (eqx.combine(*pair, is_leaf=is_none) for pair in ((map, self.constant.map), (x, fixed)))
            return dataclasses.replace(self.recurrence, map=map).step(y, x)

        return step

    def linearise(self, k: Int[Array, ""]):
        """Step `k`, with the arguments at which to linearise it."""
        step = self.step_with(self.constant.inputs_at(k))
        return step, (self.variable.map, self.variable.inputs_at(k), self.previous[k])

    def forwards(self, theta: Parts, r: Float[Array, " N D"]):
        """The tangents of all states: the solution of `system`."""
        start = jnp.zeros_like(r[0]) if theta.init is None else theta.init

        def body(k, carry):
            d, out = carry
            step, at = self.linearise(k)
            d = jax.jvp(step, at, (theta.map, theta.inputs_at(k), d))[1] + r[k]
            d = jnp.where(k < self.count, d, r[k])
            return d, out.at[k].set(d)

        _, out = _loop(largest_member(self.count), body, (start, r))
        return theta, out

    def backwards(self, theta: Parts, c: Float[Array, " N D"]):
        """The cotangents of `theta`, for cotangents of `theta` itself and of all states."""
        tables = {"c": c, "previous": self.previous, "fixed": self.constant.inputs, "inputs": self.variable.inputs}

        def body(carry, x):
            k, w, of_map = carry
            w = w + x["c"]
            step = self.step_with(x["fixed"])
            more, of_inputs, of_y = jax.vjp(step, self.variable.map, x["inputs"], x["previous"])[1](w)
            return (k - 1, of_y, jtu.tree_map(jnp.add, of_map, more)), (of_inputs, w), k, k - 1

        def in_arrays(body, carry, first, tables):
            """Every member of a batch is at the same step, so that tables are read without gathers."""
            last = largest_member(first)
            outputs = jtu.tree_map(jnp.zeros_like, (theta.inputs, c))

            def one(j, loop):
                carry, outputs = loop
                k = last - j
                made = k <= first
                new, output, *_ = body(carry, jtu.tree_map(lambda x: x[k], tables))
                carry, output = jtu.tree_map(
                    lambda new, old: jnp.where(made, new, old),
                    (new, output),
                    (carry, jtu.tree_map(lambda x: x[k], outputs)),
                )
                return carry, jtu.tree_map(lambda xs, x: xs.at[k].set(x), outputs, output)

            return _loop(last + 1, one, (carry, outputs))

        first = (self.count - 1).astype(jnp.int32)
        start = first, jnp.zeros_like(c[0]), theta.map
        loop = indexed_loop(body, start, first, tables, c.shape[0], self.kernels, descending=True, otherwise=in_arrays)
        (_, w, of_map), (of_inputs, out), in_kernel = loop
        if not on_cpu(self.kernels):
            w = jnp.where(self.first_product_agrees(c, out, w) | ~in_kernel, w, jnp.nan)
        made = jnp.arange(c.shape[0], dtype=jnp.int32) <= first
        where = lambda new, old: jnp.where(made.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        of_inputs = jtu.tree_map(lambda x, old: old + where(x, 0), of_inputs, theta.inputs)
        return Parts(None if theta.init is None else theta.init + w, of_map, of_inputs), where(out, c)

    def first_product_agrees(self, c: Float[Array, " N D"], out: Float[Array, " N D"], w: Float[Array, " D"]):
        """Whether the product of the last step with its cotangent, made once more in XLA, is what a kernel says it is. (A
        kernel that was compiled wrongly is wrong in nearly all steps.)"""
        last = jnp.maximum(self.count - 1, 0)
        step, (map, x, y) = self.linearise(last)
        (want,) = jax.vjp(lambda y: step(map, x, y), y)[1](c[last])
        before = jnp.maximum(last - 1, 0)
        found = jnp.where(last > 0, out[before] - c[before], w)
        size = jnp.maximum(jnp.max(jnp.abs(want)), jnp.max(jnp.abs(out[before])))
        near = jnp.abs(found - want) <= jnp.finfo(c.dtype).eps ** 0.5 * size
        return jnp.all(near) | (self.count == 0) | ~jnp.all(jnp.isfinite(want))

    def system(self, unknowns):
        """`(theta, d) -> (theta, d[i] - A[i] d[i-1] - (dF[i]/dtheta) theta)`, without a loop, since JAX differentiates it
        for derivatives of higher order."""
        theta, d = unknowns
        before = shift(d) if theta.init is None else preceded_by(theta.init, d)

        def product(k, d):
            step, at = self.linearise(k)
            return jax.jvp(step, at, (theta.map, theta.inputs_at(k), d))[1]

        index = jnp.arange(d.shape[0], dtype=self.count.dtype)
        products = jax.vmap(product)(index, before)
        return theta, d - jnp.where((index < self.count)[:, None], products, 0)


def _loop(count: Int[Array, ""], body, carry: PyTree) -> PyTree:
    return lax.fori_loop(jnp.zeros_like(count), count, body, carry)
