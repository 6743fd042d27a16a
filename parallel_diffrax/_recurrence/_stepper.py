"""Sequential steps of a recurrence, as fast as the device allows."""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from .._kernels import (
    as_scalars,
    by_batch_size,
    by_platform,
    closed,
    in_scalars,
    kernel_loop,
    largest_member,
    loop_operations,
    object_array,
    on_cpu,
    repeats,
    ScalarFunction,
    scalarise,
)
from .._scan import preceded_by, row_at


# Largest number of scalar operations of a step in scalars, and of unrolled steps together. Beyond it, the time to compile
# grows faster than the time saved.
_MAX_SCALAR_COST = 2000.0
# The same for a kernel, which is compiled once, and whose loops are loops.
MAX_KERNEL_COST = 4000.0
_MAX_SCALAR_UNROLL = 8
_VECTOR_UNROLL = 4

# Number of sequential steps between two checks of whether to continue. On a GPU, a loop of known length takes less than half
# the time per step of a loop whose condition the host reads back. A kernel checks by itself.
_CHUNK = 256
_KERNEL_CHUNK = 4096
# On a CPU the check costs as much as some steps in scalars. Other steps cost more.
_CPU_PIECE = 64
_COSTLY_PIECE = 16

# The steps of a kernel are made again in XLA, all at once, and compared: all of them if that takes at most this many scalar
# operations in the whole batch, which takes no time that could be measured (H200: 512 steps of 1024 members, 162 operations
# each). Otherwise as many as that allows, at least `_LEAST_CHECKED` of each member. A kernel that was compiled wrongly is
# wrong in nearly all steps.
_MOST_CHECKED = 2**27
_LEAST_CHECKED = 8

_Step = Callable[[Float[Array, " D"], PyTree], Float[Array, " D"]]


def largest_chunk(kernels: str = "auto") -> int:
    """The largest number of steps that a `Stepper` makes at once."""
    return _CHUNK if on_cpu(kernels) else _KERNEL_CHUNK


def kernels_make(like: Array) -> Bool[Array, ""]:
    """Whether a `Stepper` that has a kernel uses it, where and in whatever batch the program runs. `like` has every batch
    axis."""
    no = lambda like: jnp.array(False)
    kernel = by_batch_size(lambda size: lambda like: jnp.array(not repeats(size)))
    return by_platform(like, kernel=kernel, cpu=no, default=no)


def operations_in_kernel(step: _Step, state: Float[Array, " D"], x: PyTree) -> float | None:
    """The number of scalar operations of a step in a kernel, whatever the device; `None` if it cannot be one."""
    # Off: nothing is lowered.
    stepper = Stepper(closed(step, state, x), state, x, 1, kernels="off")
    return loop_operations(stepper._one_step, *stepper._kernel_arguments(state, x, 1), MAX_KERNEL_COST)


class Steps(NamedTuple):
    """The result of a chunk of steps: the `states` after each, the number of steps `made`, and whether all states are
    `finite`. The states after those that were made repeat the last."""

    states: Float[Array, " C D"]
    made: Int[ArrayLike, ""]
    finite: Bool[Array, ""]

    @classmethod
    def of(cls, states: Float[Array, " C D"], made: Int[ArrayLike, ""]) -> "Steps":
        """The result with `finite` found from the states."""
        return cls(states, made, jnp.all(jnp.isfinite(states)))


class Stepper:
    """Makes chunks of steps `state <- step(state, x)`.

    If the step is small and the device allows, a chunk is one kernel. Otherwise it is a `lax.scan`, with a small step in
    scalars. (On a CPU only the inside of a step: a state in scalars is up to ten times slower.)

    `step` has no tangents. `state` and `x` are examples, `most` the largest useful number of steps at once, `chunk` the
    largest possible one. With `while_finite`, a kernel may stop after a state that is not finite. `kernels` is the backend
    of kernels, `off`, or `auto`.
    """

    def __init__(
        self,
        step: _Step,
        state: Float[Array, " D"],
        x: PyTree,
        most: int,
        while_finite: bool = False,
        kernels: str = "auto",
    ):
        self.step, self.chunk, self.while_finite = step, min(most, _CHUNK), while_finite
        self.kernel = self.scalar = None
        self.on_cpu = on_cpu(kernels)
        if self.on_cpu:
            self.step = in_scalars(step, state, x, max_cost=_MAX_SCALAR_COST)
            self.piece = _COSTLY_PIECE if self.step is step else _CPU_PIECE
            return
        # `by_batch_size` takes the arrays that the step closes over as arguments.
        self.step = step = closed(step, state, x)
        self.scalar = scalarise(step, state, x, max_cost=MAX_KERNEL_COST)
        if self.scalar is None:
            return
        num_rows = min(most, _KERNEL_CHUNK)
        self.kernel = kernel_loop(self._one_step, *self._kernel_arguments(state, x, num_rows), MAX_KERNEL_COST, kernels)
        if self.kernel is not None:
            self.chunk = num_rows

    @property
    def kernel_operations(self) -> float | None:
        """The number of scalar operations of a step, if there is a kernel."""
        return None if self.kernel is None else self.kernel.scalar.cost

    def __call__(
        self, state: Float[Array, " D"], xs: PyTree, count: int | Int[Array, ""], check: bool = False
    ) -> Steps:
        """Makes at least `count` steps (which is at least 1), but at most `chunk`, which is the length of `xs`.

        If `check`, the steps of a kernel are made again in XLA, or some of very many. If they differ by more than half of
        the digits, all states are NaN. A guess that is verified later needs no check."""
        through = functools.partial(step_through_vectors, self.step)
        plain = lambda state, xs, count: self._whole_chunk(through(state, xs, self.chunk))
        # A known number of steps leaves nothing to repeat.
        whole = isinstance(count, int) and count >= self.chunk and not self.while_finite
        count = jnp.clip(jnp.asarray(count), 1, self.chunk)
        if self.on_cpu:
            pieces = lambda: Steps.of(*step_through_pieces(through, state, xs, self.chunk, self.piece, count))
            return plain(state, xs, count) if whole else pieces()
        if self.kernel is None:
            return lax.platform_dependent(state, xs, count, cpu=plain, default=self._scan)
        kernel = functools.partial(self._kernel, whole, check)
        return by_platform(state, xs, count, kernel=kernel, cpu=plain, default=self._scan)

    def _whole_chunk(self, states) -> Steps:
        return Steps.of(states, jnp.array(self.chunk))

    def _scan(self, state, xs, count):
        del count
        return self._whole_chunk(step_through(self.step, self.scalar, state, xs, self.chunk))

    def _kernel(self, whole: bool, check: bool, state, xs, count):
        kernel, scalar, (arrays, static) = self.kernel, self.scalar, eqx.partition(self.step, eqx.is_array)
        assert kernel is not None and scalar is not None

        def in_kernel(size, arrays, step_operands, operands, state, xs, count):
            end, states = kernel.run(self._carry(state, count), jnp.zeros((), jnp.int32), xs, operands)
            made, finite = end["made"].astype(count.dtype), end["finite"] > 0
            states = states if whole else _repeat_last(states, made, end["state"])
            if check:
                num_checked = max(_LEAST_CHECKED, int(_MOST_CHECKED / (size * scalar.cost)))
                step = eqx.combine(arrays, static)
                correct = _agrees(step, scalar, step_operands, state, states, xs, made, num_checked)
                states, finite = jnp.where(correct, states, jnp.nan), correct & finite
            return Steps(states, made, finite)

        def in_arrays(arrays, step_operands, operands, state, xs, count):
            del step_operands, operands
            step, first = eqx.combine(arrays, static), jtu.tree_map(lambda x: x[0], xs)
            scalar = scalarise(step, state, first, max_cost=_MAX_SCALAR_COST)
            through = functools.partial(step_through, step, scalar)
            return Steps.of(*step_through_pieces(through, state, xs, self.chunk, _CHUNK, count))

        choose = lambda size: in_arrays if repeats(size) else functools.partial(in_kernel, size)
        return by_batch_size(choose)(arrays, scalar.operands, kernel.operands, state, xs, count)

    def _kernel_arguments(self, state, x, num_rows: int) -> tuple[PyTree, PyTree, int]:
        """The carry, the tables and the number of outputs of the kernel."""
        table = jtu.tree_map(lambda x: jax.ShapeDtypeStruct((num_rows, *jnp.shape(x)), jnp.result_type(x)), x)
        return self._carry(state, 1), table, num_rows

    @staticmethod
    def _carry(state, count):
        made, finite = jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)
        return {"state": state, "made": made, "finite": finite, "count": jnp.asarray(count, jnp.int32)}

    def _one_step(self, carry, x):
        state, made = self.step(carry["state"], x), carry["made"] + 1
        finite = jnp.all(jnp.isfinite(state))
        more = made < carry["count"]
        if self.while_finite:
            more = more & finite
        carry = {**carry, "state": state, "made": made, "finite": jnp.where(finite, carry["finite"], 0)}
        return carry, state, made - 1, jnp.where(more, made, -1)


def _agrees(
    step: _Step, scalar_step: ScalarFunction, operands, init, states, xs, made, num_checked: int
) -> Bool[Array, ""]:
    """Whether about `num_checked` of the steps that were made, and the last, are those of XLA, to half of the digits.

    The digits are relative to the largest component. Steps from a state that is not finite agree. In scalars, the steps are
    one kernel of XLA's."""
    num_steps, size = states.shape
    stride = -(-num_steps // num_checked)
    first = (num_steps - 1) % stride
    # Slices, which XLA makes without a copy of all states.
    picked = lambda x: x[first::stride]
    before, after, inputs = picked(preceded_by(init, states)), picked(states), jtu.tree_map(picked, xs)
    before, after = ([x[:, j] for j in range(size)] for x in (before, after))

    def in_scalars(y, x):
        consts = list(map(as_scalars, scalar_step.consts(operands)))
        return tuple(scalar_step(object_array(y), jtu.tree_map(as_scalars, x), consts=consts))

    if scalar_step.xla_cost <= _MAX_SCALAR_COST:
        again = jax.vmap(in_scalars)(before, inputs)
    else:
        again = jax.vmap(step)(jnp.stack(before, axis=1), inputs).T
    largest = [jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), initial=0) for x in after]
    tolerance = jnp.finfo(states.dtype).eps ** 0.5 * functools.reduce(jnp.maximum, largest)
    agree = jnp.arange(first, num_steps, stride) < made
    agree = ~functools.reduce(operator.and_, map(jnp.isfinite, before), agree)
    near = [(jnp.abs(x - y) <= tolerance) | ~(jnp.isfinite(x) | jnp.isfinite(y)) for x, y in zip(again, after)]
    return jnp.all(agree | functools.reduce(operator.and_, near))


def step_through_vectors(step: _Step, state, xs, length: int, unroll: int = 1) -> Float[Array, " n D"]:
    """The states after each of `length` steps, with the step in vectors. (Unrolling makes a loop on a CPU up to eight times
    slower, and compilation slower on any device.)"""

    def body(state, x):
        state = step(state, x)
        return state, state

    return lax.scan(body, state, xs, length=length, unroll=min(unroll, length))[1]


def step_through_scalars(scalar_step: ScalarFunction, state, xs, length: int) -> Float[Array, " n D"]:
    """Like `step_through_vectors`, with a step from `scalarise`."""
    unroll = int(max(1, min(_MAX_SCALAR_UNROLL, _MAX_SCALAR_COST // max(scalar_step.xla_cost, 1))))

    def body(state, x):
        state = tuple(scalar_step(object_array(state), jtu.tree_map(as_scalars, x)))
        return state, state

    _, states = lax.scan(body, tuple(state), xs, length=length, unroll=min(unroll, length))
    return jnp.stack(states, axis=-1)


def step_through(step: _Step, scalar_step: ScalarFunction | None, state, xs, length: int) -> Float[Array, " n D"]:
    """The states after each of `length` steps, in scalars if that pays."""
    if scalar_step is not None and scalar_step.xla_cost <= _MAX_SCALAR_COST:
        try:
            return step_through_scalars(scalar_step, state, xs, length)
        except Exception:  # of any kind: an optional fast path must never be the reason that nothing runs
            pass
    return step_through_vectors(step, state, xs, length, _VECTOR_UNROLL)


def step_through_pieces(
    through: Callable[..., Float[Array, " n D"]], state, xs, length: int, piece: int, count: Int[Array, ""]
) -> tuple[Float[Array, " n D"], Int[Array, ""]]:
    """Like `through(state, xs, length)`, but stops after `count` steps, rounded up to a `piece`; in a batch, after those of
    the member with most. Returns the states, and this number of steps. The states after those repeat the last."""
    size = piece if length % piece == 0 else length
    most = largest_member(count)

    def body(carry):
        made, state, states = carry
        inputs = jtu.tree_map(lambda x: lax.dynamic_slice_in_dim(x, made, size), xs)
        more = through(state, inputs, size)
        return made + size, more[-1], lax.dynamic_update_slice_in_dim(states, more, made, axis=0)

    states = jnp.zeros((length, *state.shape), state.dtype)
    *_, states = lax.while_loop(lambda carry: carry[0] < most, body, (jnp.zeros_like(most), state, states))
    made = -(-count // size) * size
    return _repeat_last(states, made, row_at(states, made - 1)), made


def _repeat_last(states, made, last):
    return jnp.where((jnp.arange(states.shape[0], dtype=made.dtype) < made)[:, None], states, last[None])
