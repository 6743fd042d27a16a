"""The derivative of steps that were made sequentially and of which few states were kept: the others are made again."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._kernels import has_forward_mode, indexed_loop, largest_member, on_cpu
from .._scan import row_at, shift
from ._recurrence import Recurrence
from ._sequential_derivative import (
    depends_on,
    is_none,
    LastState,
    Parts,
    SequentialSweep,
    variable_parts,
    with_sequential_derivative,
)
from ._tangents import stop_gradient, with_axes_of


# The states of this many steps are stored at a time; on a CPU as many as have this many entries, but at least a few.
_SEGMENT = 256
_ENTRIES, _FEWEST = 2048, 16


def segment_length(most: int, size: int, kernels: str) -> int:
    """Of how many steps the states, of this size, are stored at a time: `most`, or on a CPU fewer of large ones."""
    return min(most, max(_ENTRIES // size, _FEWEST)) if on_cpu(kernels) and size > 0 else most


class KeptStates(eqx.Module):
    """What is kept of a sequence of steps: the state `y` after the last one, the states `before` some of them, and an
    `outcome` without derivatives."""

    y: Float[Array, " D"]
    before: Float[Array, " M D"]
    outcome: Any


class AbstractInputs(eqx.Module):
    """The inputs of steps that were made, in arrays for at most `capacity` of them."""

    @property
    @abc.abstractmethod
    def capacity(self) -> int:
        """`N`."""

    @abc.abstractmethod
    def rows(self, first: Int[Array, ""], length: int) -> PyTree:
        """The inputs of `length` steps from step `first` on, stacked. Those after the last step may be of
        any step that can be made: it is made where another member of a batch has more steps."""


class MadeSteps(eqx.Module):
    """Steps that were made sequentially.

    - `map`: a step as a function that is differentiated, `y1 = F(y0, (x, guess))`, where `guess` is about `y1`. It holds
        every array that the step depends on.
    - `make`: the same step without derivatives and without a guess, `y1 = F(y0, x)`.
    - `init`: the state before the first step.
    - `inputs`: the input `x` of each step.
    - `count`: the number of steps.
    - `kept`: the indices of the steps before which the state is kept; `count` for the state after the last one.
    """

    map: Callable
    make: Callable
    init: Float[Array, " D"]
    inputs: AbstractInputs
    count: Int[Array, ""]
    kept: Int[Array, " M"]

    def recurrence(self, inputs: PyTree, states: Float[Array, " K D"]) -> Recurrence:
        """Steps with these `inputs` that lead to about these `states`."""
        return Recurrence(self.map, self.init, (inputs, states), states.shape[0])


def with_replayed_derivative(
    steps: MadeSteps, found: KeptStates, in_plain_programs: KeptStates, kernels: str
) -> KeptStates:
    """The states in `found`, with their derivative in everything that `steps.map` and `steps.init` depend on, to any order.

    `in_plain_programs` are the same states, found without `steps.inputs`. They replace `found` in programs that are not
    differentiated, in which nothing else may need the inputs.

    The forward solve stores one input per step, and no states. In reverse mode the steps are made again from their inputs,
    256 at a time, from the last to the first: twice, except the last 256. Each segment is followed by one vector-Jacobian
    product per step (see `with_sequential_derivative`). Nothing that an adaptive solve decided is decided again. Memory, for
    at most `N` steps: `N` inputs, and `256 + N / 256` states. In forward mode, tangents go along with the steps, and take
    `N D` numbers.
    """
    made, *both = stop_gradient((steps, found, in_plain_programs))
    found, plain = (with_axes_of(states.y, states) for states in both)
    first = steps.inputs.rows(jnp.zeros((), jnp.int32), 1)
    example = jtu.tree_map(lambda x: x[0], first), found.y
    attach = _attach if has_forward_mode(steps.map, steps.init, example) else _attach_reverse
    return attach((steps.map, steps.init), made, found, plain, kernels)


def _attach_plain(theta, made, found, plain, kernels):
    del theta, made, found, kernels
    return plain


_attach, _attach_reverse = eqx.filter_custom_jvp(_attach_plain), eqx.filter_custom_vjp(_attach_plain)


@_attach.def_jvp
def _attach_jvp(primals, tangents):
    theta, made, found, _, kernels = primals
    # For higher orders this rule is differentiated too, and there the states depend on `theta` again.
    found = _attach(theta, made, found, found, kernels)
    t_theta = Parts(tangents[0][1], tangents[0][0], None)
    replay = _Replay(theta, made, t_theta, kernels)
    zeros = jtu.tree_map(lambda x: jnp.zeros_like(x) if eqx.is_inexact_array(x) else None, found)
    zero = depends_on(t_theta, found.y.dtype)
    t_theta = jtu.tree_map(lambda x: x + zero.astype(x.dtype), t_theta)
    rhs = t_theta, jnp.broadcast_to(zero, found.before.shape), jnp.broadcast_to(zero, found.y.shape)
    _, before, y = lax.custom_linear_solve(
        replay.system, rhs, lambda _, b: replay.forwards(*b), lambda _, c: replay.backwards(*c)
    )
    return found, eqx.tree_at(lambda kept: (kept.y, kept.before), zeros, (y, before))


@_attach_reverse.def_fwd
def _attach_reverse_fwd(perturbed, theta, made, found, plain, kernels):
    del perturbed, plain
    return _attach_reverse(theta, made, found, found, kernels), None


@_attach_reverse.def_bwd
def _attach_reverse_bwd(_, cotangent, perturbed, theta, made, found, plain, kernels):
    del perturbed, plain
    variable = Parts(theta[1], eqx.filter(theta[0], eqx.is_inexact_array), None)
    replay = _Replay(theta, made, variable, kernels)
    zero = jtu.tree_map(jnp.zeros_like, variable)
    of_before = jnp.zeros_like(found.before) if cotangent.before is None else cotangent.before
    of_y = jnp.zeros_like(found.y) if cotangent.y is None else cotangent.y
    of_theta, *_ = replay.backwards(zero, of_before, of_y)
    return of_theta.map, of_theta.init


class _Replay:
    """Steps that are made again, as functions of the parts of `theta`, the map and the initial state, that are perturbed:
    those that are not `None` in `variable`."""

    def __init__(self, theta, made: MadeSteps, variable: Parts, kernels: str):
        map, init = theta
        count, kept = (x.astype(jnp.int32) for x in (made.count, made.kept))
        self.steps, self.kernels = dataclasses.replace(made, map=map, init=init, count=count, kept=kept), kernels
        self.constant, self.variable = variable_parts(Parts(init, map, None), variable)
        self.capacity = made.inputs.capacity
        self.length = min(segment_length(_SEGMENT, init.size, kernels), self.capacity)

    def forwards(self, theta: Parts, before: Float[Array, " M D"], y: Float[Array, " D"]):
        """The tangents of the states: the solution of `system`."""
        steps = self.steps
        start = jnp.zeros_like(y) if theta.init is None else theta.init

        inputs = steps.inputs.rows(jnp.zeros((), jnp.int32), self.capacity)

        def body(k, carry):
            (value, d), stored = carry
            x = jtu.tree_map(lambda x: x[k], inputs)
            after = steps.make(value, x)
            product = jax.jvp(self.step(x, after), (self.variable.map, value), (theta.map, d))[1]
            return (after, product), stored.at[k].set(d)

        def one(k, carry):
            (state, stored), active = carry, k < steps.count
            new, stored = body(k, (state, stored))
            return jtu.tree_map(lambda new, old: jnp.where(active, new, old), new, state), stored

        stored = jnp.zeros((self.capacity, *y.shape), y.dtype)
        count = largest_member(steps.count)
        (_, d), stored = lax.fori_loop(0, count, one, ((steps.init, start), stored))
        kept = jax.vmap(lambda k: row_at(stored, k))(steps.kept)
        kept = jnp.where((steps.kept < steps.count)[:, None], kept, d)
        return theta, before + kept, y + d

    def backwards(self, theta: Parts, before: Float[Array, " M D"], y: Float[Array, " D"]):
        """The cotangents of `theta`, for cotangents of `theta` itself and of all states that were kept.

        Both passes over the segments are one loop, ahead and then back: it is compiled once, and a sequence of one segment
        is made once. All members of a batch are at the same segment, so that arrays are read without gathers.
        """
        steps, length, longest = self.steps, self.length, largest_member(self.steps.count)
        # The state after the last step is kept by itself, but may be among the others too.
        of_last = (steps.kept >= steps.count)[:, None]
        of_before, of_y = before, y
        y, before = y + jnp.sum(jnp.where(of_last, before, 0), axis=0), jnp.where(of_last, 0, before)

        def body(state):
            index, ahead, start, starts, w, of_map = state
            first = index * length
            start = jnp.where(ahead, start, starts[index])
            starts = starts.at[index].set(start)
            made = jnp.clip(steps.count - first, 0, length)
            inputs = steps.inputs.rows(first, length)
            states, end = self.replay(start, inputs, made)
            sweeps = ~ahead | (first + length >= longest)
            inside = (steps.kept > first) & (steps.kept < first + length)
            place = jnp.where(inside, steps.kept - first - 1, length)
            c = jnp.zeros((length, *y.shape), y.dtype).at[place].add(before, mode="drop")
            swept_w, of_map = self.sweep(states, end, inputs, jnp.where(sweeps, made, 0), w, of_map, c)
            here = jnp.where((steps.kept == first)[:, None], before, 0)
            w = jnp.where(sweeps, swept_w + jnp.sum(here, axis=0, dtype=y.dtype), w)
            return jnp.where(sweeps, index - 1, index + 1), ~sweeps, end, starts, w, of_map

        num_segments = -(-self.capacity // length)
        starts = jnp.zeros((num_segments, *y.shape), y.dtype)
        state = jnp.zeros((), jnp.int32), jnp.array(True), steps.init, starts, y, theta.map
        state = body(state) if num_segments == 1 else lax.while_loop(lambda state: state[0] >= 0, body, state)
        *_, w, of_map = state
        return Parts(None if theta.init is None else theta.init + w, of_map, None), of_before, of_y

    def replay(self, y: Float[Array, " D"], inputs: PyTree, made: Int[Array, ""]):
        """The states before `made` steps with these inputs, of which the first begins in the state `y`, and the one after
        them."""
        steps, length = self.steps, jtu.tree_leaves(inputs)[0].shape[0]

        def body(carry, x):
            y, k = carry
            return (steps.make(y, x), k + 1), y, k, jnp.where(k + 1 < made, k + 1, -1)

        index = jnp.where(made > 0, 0, -1)
        start = y, jnp.zeros((), jnp.int32)
        (y, _), states, in_kernel = indexed_loop(body, start, index, inputs, length, self.kernels)
        if not on_cpu(self.kernels):
            y = jnp.where(self.last_step_agrees(states, y, inputs, made) | ~in_kernel, y, jnp.nan)
        return states, y

    def last_step_agrees(self, states: Float[Array, " K D"], y: Float[Array, " D"], inputs, made) -> Bool[Array, ""]:
        """Whether the last step, made once more in XLA, is what a kernel says it is. (A kernel that was compiled wrongly is
        wrong in nearly all steps.)"""
        last = jnp.maximum(made - 1, 0)
        again = self.steps.make(states[last], jtu.tree_map(lambda x: x[last], inputs))
        near = jnp.abs(again - y) <= jnp.finfo(y.dtype).eps ** 0.5 * jnp.max(jnp.abs(y), initial=0)
        return jnp.all(near) | (made == 0)

    def sweep(self, states, end, inputs, made, w, of_map, c):
        """The cotangents of the state before the first of `made` steps, and of the map: from those of the state after the
        last one, `w`, of the states after each, `c`, and of the map so far."""
        index = jnp.arange(states.shape[0], dtype=made.dtype)
        guess = jnp.where((index == made - 1)[:, None], end[None], shift(states, -1))
        fixed = inputs, guess
        nothing = jtu.tree_map(lambda _: None, fixed)
        recurrence = self.steps.recurrence(inputs, guess)
        sweep = SequentialSweep(
            recurrence,
            self.constant._replace(inputs=fixed),
            self.variable._replace(inputs=nothing),
            states,
            made,
            self.kernels,
        )
        last = (index == made - 1)[:, None]
        done, _ = sweep.backwards(Parts(jnp.zeros_like(w), of_map, nothing), jnp.where(last, c + w[None], c))
        return jnp.where(made > 0, done.init, w), done.map

    def step(self, x: PyTree, guess: Float[Array, " D"]):
        """A step as a function of the variable part of the map and of the state before."""
        return lambda map, y: eqx.combine(map, self.constant.map, is_leaf=is_none)(y, (x, guess))

    def system(self, unknowns):
        """The tangents of the parts and of the kept states, minus the latter's from the former, without a loop for JAX to
        differentiate: it does so for derivatives of higher order."""
        theta, before, y = unknowns
        steps = self.steps
        inputs = steps.inputs.rows(jnp.zeros((), jnp.int32), self.capacity)
        states, end = self.replay(steps.init, inputs, steps.count)
        index = jnp.arange(self.capacity, dtype=jnp.int32)
        after = jnp.where((index >= steps.count - 1)[:, None], end[None], shift(states, -1))
        # Entries after the last step repeat it.
        inputs = jtu.tree_map(lambda x: x[jnp.minimum(index, jnp.maximum(steps.count - 1, 0))], inputs)
        inputs, after, end = stop_gradient((inputs, after, end))

        def kept(variable: Parts):
            init, map = (
                eqx.combine(*pair, is_leaf=is_none)
                for pair in ((variable.init, self.constant.init), (variable.map, self.constant.map))
            )
            recurrence = dataclasses.replace(steps, map=map, init=init).recurrence(inputs, after)
            y, last = with_sequential_derivative(recurrence, after, LastState(end, steps.count), self.kernels)
            before = recurrence.previous(y)[jnp.minimum(steps.kept, self.capacity - 1)]
            return jnp.where((steps.kept < steps.count)[:, None], before, last.y), last.y

        of_before, of_y = jax.jvp(kept, (self.variable,), (theta,))[1]
        # Also formally, every part of the system depends on the variable parts: see `depends_on`.
        one = 1 + depends_on(self.variable, y.dtype)
        theta, before, y = jtu.tree_map(lambda x: x * one.astype(x.dtype), unknowns)
        return theta, before - of_before, y - of_y
