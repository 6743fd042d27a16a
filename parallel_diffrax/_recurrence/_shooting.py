"""Multiple shooting in kernels: Newton's method with the ends of intervals of several steps as the unknowns."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from .._kernels import closed, kernel_loop, KernelLoop, wide_loop
from .._scan import AbstractScan, DenseTransitions, split_segments
from ._newton import safeguarded_update
from ._recurrence import Recurrence
from ._root_finder import largest_update
from ._stepper import MAX_KERNEL_COST
from ._tolerance import effective_scale, num_leading_true, rounding_size, Tolerance


# The number of iterations. From a good guess Newton's method takes three or four, the last of which shows that the one
# before was enough. A look of the host, to see whether fewer are enough, takes as long as two.
ITERATIONS = 4


class Shooting(eqx.Module):
    """A recurrence in `M` intervals of `L` steps each.

    Newton's method on the states after the intervals, `y[m] = F^L(y[m-1])`, has the solution of Newton's method on all
    `N = M L` steps. On a GPU one kernel makes the steps of all intervals with their tangents, with one thread for each
    interval and tangent, and writes `M D (D + 1)` numbers. On all steps, an iteration passes over `N D^2` numbers many
    times.

    **Attributes:** `recurrence`, as a recurrence of `M` steps whose inputs are those of the last step of each interval, for
    predictors.

    ??? cite "Reference"

        Bock, Plitt, "A multiple shooting algorithm for direct solution of optimal control problems", IFAC Proceedings 17
        (1984).
    """

    recurrence: Recurrence
    length: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    # How many steps of each interval are made, and their inputs, of leading axes `(L, M)`.
    _counts: Int[Array, " M"]
    _inputs: PyTree
    # From the states before all intervals: `F^L` (or its increment) with its Jacobians; the states after every step.
    _linearise: Callable
    _states: Callable

    @classmethod
    def of(cls, recurrence: Recurrence, count: Int[Array, ""], length: int, kernels: str) -> "Shooting | None":
        """The leading `count` steps of `recurrence`, which has no tangents, in intervals of `length`. `None` if a step has
        inner unknowns or cannot be made in a kernel."""
        if recurrence.stages is not None:
            return None
        init, first_input = recurrence.init, recurrence.first_input
        shots = _Shots(closed(recurrence.map, init, first_input), recurrence.incremental)
        one = jnp.ones((), jnp.int32)
        table = jtu.tree_map(lambda x: jnp.broadcast_to(x, (length, *x.shape)), first_input)
        make = lambda body, carry, num_outputs: kernel_loop(body, carry, table, num_outputs, MAX_KERNEL_COST, kernels)
        linearising = make(shots.with_tangent, shots.start(init, one, init), 0)
        storing = None if linearising is None else make(shots.with_output, shots.start(init, one), length)
        if linearising is None or storing is None:
            return None
        inputs = jtu.tree_map(lambda x: split_segments(x, length=length, fill="last"), recurrence.inputs)
        num_intervals = jtu.tree_leaves(inputs)[0].shape[0]
        starts = length * jnp.arange(num_intervals, dtype=jnp.int32)
        counts = jnp.clip(count.astype(jnp.int32) - starts, 0, length)
        last = jtu.tree_map(lambda x: x[:, -1], inputs)
        # Adjacent threads read adjacent numbers. Transposed here, the inputs are not transposed in every iteration.
        inputs = jtu.tree_map(lambda x: jnp.swapaxes(x, 0, 1), inputs)
        before = jnp.broadcast_to(init, (num_intervals, *init.shape))
        linearise = closed(shots.linearise(linearising), before, counts, inputs)
        states = closed(shots.states(storing), before, counts, inputs)
        whole = dataclasses.replace(recurrence, inputs=last, length=num_intervals, active=None)
        return cls(whole, length, recurrence.length, counts, inputs, linearise, states)

    def linearise(self, y: Float[Array, " M D"]) -> tuple[Float[Array, " M D"], DenseTransitions]:
        """The residual `F^L(y[m-1]) - y[m]` of all intervals, and their transitions."""
        before = self.recurrence.previous(y)
        moved, A = self._linearise(before, self._counts, self._inputs)
        r = (before - y) + moved if self.recurrence.incremental else moved - y
        return r, DenseTransitions(A)

    def all_states(self, y: Float[Array, " M D"]) -> Float[Array, " N D"]:
        """The states after all steps, from those after the intervals. Steps that are not made leave the state unchanged."""
        states = self._states(self.recurrence.previous(y), self._counts, self._inputs)
        inside = jnp.arange(1, self.length + 1, dtype=self._counts.dtype)[None] < self._counts[:, None]
        states = jnp.where(inside[..., None], states, y[:, None])
        return states.reshape(-1, states.shape[-1])[: self.num_steps]

    def repeat(self, x: Float[Array, " M D"]) -> Float[Array, " N D"]:
        """The value of each interval for all its steps."""
        return jnp.repeat(x, self.length, axis=0)[: self.num_steps]

    def solve(self, guess: Float[Array, " M D"], tolerance: Tolerance, scan: AbstractScan) -> "ShootingResult":
        """`ITERATIONS` iterations of Newton's method from a finite guess."""
        largest = largest_update(guess)

        def iterate(_, found):
            y, *_ = found
            r, transitions = self.linearise(y)
            d = scan.solve(transitions, r)
            y, applied = safeguarded_update(y, r, transitions.finite(), d, largest)
            return y, r, d, applied, transitions

        zeros, none = jnp.zeros_like(guess), jnp.zeros(guess.shape[0], bool)
        A = jnp.zeros((*guess.shape, guess.shape[1]), guess.dtype)
        # A loop of known length needs no look of the host.
        first = guess, zeros, zeros, none, DenseTransitions(A)
        y, r, d, applied, transitions = lax.fori_loop(0, ITERATIONS, iterate, first)
        scale = tolerance.scale(y)
        size = rounding_size(transitions, scale)
        scale = effective_scale(scale, size)
        at_rounding = tolerance.at_rounding(r, size) & tolerance.resolved(d, scale, size)
        small = (tolerance.error(d, scale) <= 1) | at_rounding
        return ShootingResult(y, num_leading_true(applied & small), size, transitions)


class ShootingResult(NamedTuple):
    """The states `y` after the intervals, of which the leading `num_converged` have converged; the size of the numbers that
    each entry is computed from, and the transitions of the intervals, in the last iteration."""

    y: Float[Array, " M D"]
    num_converged: Int[Array, ""]
    size: Float[Array, " M D"]
    transitions: DenseTransitions


class _Shots(NamedTuple):
    """The loops over the steps of one interval. A loop carries the state before the interval (`start`) and what the steps
    have added to it (`total`), so that rounding errors are relative to the latter. If the map is not incremental, `total`
    is the state."""

    map: Callable
    incremental: bool

    def start(self, y: Float[Array, " D"], count: Int[Array, ""], seed: Float[Array, " D"] | None = None) -> dict:
        """The carry before the first step of an interval of `count` steps. `seed` is the tangent of the state `y`."""
        total = lambda x: jnp.zeros_like(x) if self.incremental else x
        carry = {"start": y, "total": total(y), "made": jnp.zeros((), jnp.int32), "count": count}
        return carry if seed is None else carry | {"seed": seed, "tangent": total(seed)}

    def move(self, start, total, x):
        """One step."""
        return total + self.map(start + total, x) if self.incremental else self.map(total, x)

    def with_tangent(self, carry, x):
        at, directions = (carry["start"], carry["total"]), (carry["seed"], carry["tangent"])
        total, tangent = jax.jvp(lambda start, total: self.move(start, total, x), at, directions)
        return self._end(carry | {"total": total, "tangent": tangent}, ())

    def with_output(self, carry, x):
        total = self.move(carry["start"], carry["total"], x)
        return self._end(carry | {"total": total}, carry["start"] + total if self.incremental else total)

    def _end(self, carry, output):
        made = carry["made"] + 1
        return carry | {"made": made}, output, made - 1, jnp.where(made < carry["count"], made, -1)

    def linearise(self, loop: KernelLoop) -> Callable:
        """`F^L` (or its increment) with its Jacobians for all intervals: one kernel, with a thread for each interval and
        column."""
        run = wide_loop(loop)

        def linearise(before, counts, inputs):
            carries = lambda seed: jax.vmap(lambda y, n: self.start(y, n, seed))(before, counts)
            seeds = jnp.eye(before.shape[1], dtype=before.dtype)
            widen = lambda one: jax.vmap(jax.vmap(one, (0, 0, 1, None)), (0, None, None, None))
            end, _ = run(widen)(jax.vmap(carries)(seeds), _first(counts), inputs, loop.operands)
            columns = jnp.moveaxis(end["tangent"], 0, -1)
            return end["total"][0], columns + seeds[None] if self.incremental else columns

        return linearise

    def states(self, loop: KernelLoop) -> Callable:
        """The states after all steps of all intervals."""
        run = wide_loop(loop)

        def states(before, counts, inputs):
            carries = jax.vmap(self.start)(before, counts)
            return run(lambda one: jax.vmap(one, (0, 0, 1, None)))(carries, _first(counts), inputs, loop.operands)[1]

        return states


def _first(counts):
    """The index of the first step of each interval, negative if it makes none."""
    return jnp.where(counts > 0, 0, -1).astype(jnp.int32)
