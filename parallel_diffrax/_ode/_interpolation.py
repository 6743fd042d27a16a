"""Dense output inside a window: the base solver's interpolant of the fine step that contains a time."""

import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._recurrence import nan_derivative_unless, nan_unless, Ravel, Segments, stop_gradient
from .._scan import shift


_KEY = "steps"


class RepeatedSteps(eqx.Module):
    """Fine steps that are made once more where their dense output is wanted, instead of all in advance: for windows with
    room for many more steps than they have. Step `k` goes from the time `begins[k]` and the raveled state `before[k]` to
    `ends[k]` and about `after[k]`."""

    # The arrays of the step map, and everything else in it: dense output is made of arrays.
    arrays: list[Array]
    begins: Float[Array, " N"]
    ends: Float[Array, " N"]
    before: Float[Array, " N D"]
    after: Float[Array, " N D"]
    rest: Any = eqx.field(static=True)
    ravel: Ravel = eqx.field(static=True)

    @classmethod
    def of(cls, step_map: Callable, begins, ends, before, after, ravel: Ravel) -> "RepeatedSteps":
        """The steps of `step_map`."""
        leaves, structure = jtu.tree_flatten(step_map)
        rest = tuple(None if eqx.is_array(x) else x for x in leaves)
        return cls([x for x in leaves if eqx.is_array(x)], begins, ends, before, after, (rest, structure), ravel)

    def all_infos(self) -> PyTree:
        """The `dense_info` of all steps."""
        infos = jax.vmap(self._alone)(jnp.arange(self.begins.shape[0]))
        return join_infos(self.step_map, infos, self.begins, self.ends)

    @property
    def can_be_kept(self) -> bool:
        """Whether Diffrax's loop can keep the steps, in arrays of zeros at first: there are no random keys of zeros."""
        return not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in self.arrays)

    @property
    def step_map(self) -> Any:
        """One step: an `AbstractStepMap`."""
        (rest, structure), arrays = self.rest, iter(self.arrays)
        return jtu.tree_unflatten(structure, [next(arrays) if x is None else x for x in rest])

    def _alone(self, index: Int[Array, ""]) -> PyTree:
        before, after = (self.ravel.unravel(y[index]) for y in (self.before, self.after))
        return self.step_map(self.begins[index], self.ends[index], before, stop_gradient(after)).dense_info

    def info(self, index: Int[Array, ""]) -> PyTree:
        """The `dense_info` of a step. It takes the step before too, if that matters."""
        if not self.step_map.joins_steps:
            return self._alone(index)
        both = jnp.stack([jnp.maximum(index - 1, 0), index])
        # (Not `vmap`, which a callback in the field need not have.)
        infos = lax.map(self._alone, both)
        infos = join_infos(self.step_map, infos, self.begins[both], self.ends[both])
        return jtu.tree_map(lambda x: x[1], infos)


def join_infos(step_map: Any, infos: PyTree, begins: Float[Array, " N"], ends: Float[Array, " N"]) -> PyTree:
    """The `dense_info` of steps in a row, each of which begins at `begins` and ends at `ends`, from that of each by itself.
    A step that does not begin where the one before ends is not joined to it: the field has jumped."""
    if not step_map.joins_steps:
        return infos
    lengths, before = ends - begins, shift(ends - begins)
    # (Nothing comes before the first step, whose `before` is zero.)
    follows = (begins == shift(ends)) & (before > 0) & (lengths > 0)
    ratios = jnp.where(follows, lengths / jnp.where(before > 0, before, 1), 1)
    joined = jax.vmap(step_map.joined)(infos, jtu.tree_map(shift, infos), ratios)
    where = lambda new, old: jnp.where(follows.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return jtu.tree_map(where, joined, infos)


class FineSteps(eqx.Module):
    """The fine steps of a window, as dense output needs them: their ends `ts`, increasing; the base solver's `dense_info` of
    each, stacked in `infos`, or how to find it; which outcomes are `finite`; for which steps the equation is `solved`; the
    `end` of the last step that was made; the `segments` that were attempted in parallel, `None` if a controller chose the
    steps.

    If only some steps were kept, `spans` are the times when they begin and end, and step `k` serves for times from `ts[k]`
    to `ts[k + 1]`. If every step was checked for an event, `last` is the last one: when it begins, and the values of the
    conditions before and after it. `states` are those at the ends of steps, where events are sought and the interpolant of
    the solver need not end there (see `may_end_elsewhere`)."""

    ts: Float[Array, " N1"]
    infos: PyTree | RepeatedSteps
    finite: Bool[Array, " N"]
    solved: Bool[Array, " N"]
    end: Float[Array, ""]
    spans: tuple[Float[Array, " N"], Float[Array, " N"]] | None = None
    last: tuple | None = None
    segments: Segments | None = None
    states: PyTree | None = None

    def as_dense_info(self) -> dict[str, "FineSteps"]:
        """The `dense_info` of a Diffrax step, which must be a dictionary of arguments of `interpolation_cls`."""
        return {_KEY: self}

    @staticmethod
    def of_dense_info(dense_info: dict[str, Any]) -> "FineSteps":
        """The inverse of `as_dense_info`, also for the stacked `infos` of a `diffrax.DenseInterpolation`."""
        return dense_info[_KEY]


class WindowInterpolation(dfx.AbstractLocalInterpolation):
    """Evaluates the base solver's interpolant of the fine step that contains a time.

    On a fine step that is not finite the value is NaN, as it is in a sequential solve. An event or a saved time there can
    then not be mistaken for a result. An evaluation costs a binary search over `N` times and one local interpolant.
    """

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    steps: FineSteps
    interpolation_cls: Callable = eqx.field(static=True)

    def __init__(self, interpolation_cls, *, t0, t1, steps):
        self.t0, self.t1, self.steps = t0, t1, steps
        self.interpolation_cls = interpolation_cls

    def end_of_step(self, index: Int[Array, ""]) -> PyTree:
        """The state at the end of a fine step."""
        if self.steps.states is None:
            return self.evaluate(self.steps.ts[index + 1])
        return jtu.tree_map(lambda y: y[index], self.steps.states)

    def evaluate(self, t0, t1=None, left: bool = True) -> PyTree:
        """The state at `t0`, or its change from `t0` to `t1`. At the end of a fine step, `left` selects the earlier one."""
        if t1 is not None:
            return jtu.tree_map(lambda b, a: b - a, self.evaluate(t1, left=left), self.evaluate(t0, left=left))
        ts, infos = self.steps.ts, self.steps.infos
        # Unrolled: on a GPU, a loop costs more than its 14 comparisons.
        index = jnp.searchsorted(ts, t0, side="left" if left else "right", method="scan_unrolled") - 1
        # Steps of length zero, at the end of a window, cannot be interpolated.
        last = jnp.searchsorted(ts, ts[-1], side="left", method="scan_unrolled") - 1
        index = jnp.clip(index, 0, jnp.maximum(last, 0))
        if isinstance(infos, RepeatedSteps):
            t0_step, t1_step, info = infos.begins[index], infos.ends[index], infos.info(index)
        else:
            begins, ends = (ts[:-1], ts[1:]) if self.steps.spans is None else self.steps.spans
            t0_step, t1_step, info = begins[index], ends[index], jtu.tree_map(lambda x: x[index], infos)
        local = self.interpolation_cls(t0=t0_step, t1=t1_step, **info)
        valid = self.steps.finite[index]
        attach = lambda x: nan_derivative_unless(valid, nan_unless(valid, x))
        return jtu.tree_map(attach, local.evaluate(t0, left=left))


def may_end_elsewhere(solver: dfx.AbstractSolver) -> bool:
    """Whether the interpolant of a step of `solver` may end apart from the state after it, as that of `diffrax.HalfSolver`
    does: it is that of one whole step, and the state that of two halves."""
    return issubclass(type(solver), dfx.AbstractWrappedSolver)


@ft.cache
def window_interpolation(interpolation_cls: Callable) -> Callable[..., WindowInterpolation]:
    """`WindowInterpolation` with the given interpolant. It is cached because it is part of the structure of a
    `diffrax.Solution`: the structures of two solves must be equal."""
    return ft.partial(WindowInterpolation, interpolation_cls)


class AbstractFineStepSolver(dfx.AbstractWrappedSolver):
    """A solver that makes several fine steps of its base solver, `solver`, in each step. Terms, orders and the vector field
    are those of the base solver. (`diffrax.AbstractWrappedSolver` forwards `isinstance` to it, but no attributes.)"""

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def interpolation_cls(self):  # pyright: ignore
        return window_interpolation(self.solver.interpolation_cls)

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)
