"""The interface of every predictor."""

import abc
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from ..._recurrence import Prediction, Recurrence, stop_gradient
from .._step_map import AbstractEmbeddedSolver
from .._window import Window


_Tree = TypeVar("_Tree")


class AbstractPredictor(eqx.Module):
    """Where the first iterate of a window comes from. It is never differentiated."""

    def prepare(self, window: Window) -> "tuple[Float[Array, ' N1'] | None, AbstractPredictor]":
        """Before a window is solved: where its fine steps end, as fractions of the window, or `None` to leave them; and the
        predictor to use for it. Without tangents."""
        del window
        return None, self

    @property
    def memory(self) -> int:
        """Of how many windows it wants the states to be kept for the next solve."""
        return 0

    def guess(self, window: Window, remembered: Float[Array, " N D"] | None) -> Callable:
        """What `solve_recurrence` calls for first guesses of parts of the window.

        **Arguments:** the window, without tangents; its states in the solve before, if there is a `memory`; NaN where
        nothing is known.
        """
        del remembered
        return WindowGuess(self, window)

    @abc.abstractmethod
    def predict(self, window: Window, recurrence: Recurrence, start_level: Int[ArrayLike, ""]) -> Prediction:
        """A first guess of all states of the window.

        **Arguments:** the window, which may be a part of the solver's, made for more steps than it has
        (`Window.part`); its recurrence; zero, or the start level of a prediction for the part before. Without tangents.
        """


class WindowGuess(eqx.Module):
    """A predictor on the parts of a window, as `solve_recurrence` calls for it."""

    predictor: AbstractPredictor
    window: Window

    def __call__(self, segment, start, count, start_level):
        part = self.window.part(start, segment.init, count, segment.length)
        if part.step_map.has_solver_state:
            prediction = self._with_memory(part, segment, start_level)
        else:
            prediction = self.predictor.predict(part, segment, start_level)
        return prediction

    def _with_memory(self, part: Window, segment: Recurrence, start_level) -> Prediction:
        """The states of a solver without memory, each with what a step there would remember. (The memory of a large
        step says nothing about that of a small one, so a coarse grid cannot carry it.)"""
        plain = part.stateless()
        recurrence = plain.recurrence()
        recurrence = eqx.tree_at(lambda r: r.active, recurrence, segment.active, is_leaf=lambda x: x is None)
        prediction = self.predictor.predict(plain, recurrence, start_level)

        def complete(t0, t1, before, y):
            memory = part.step_map.solver_state_after(t0, t1, plain.ravel.unravel(before))
            return part.ravel.ravel((plain.ravel.unravel(y), memory))

        y = jax.vmap(complete)(part.ts[:-1], part.ts[1:], recurrence.previous(prediction.y), prediction.y)
        return eqx.tree_at(lambda p: p.y, prediction, y)


def hermite(
    x: Float[Array, "*N #D"],
    length: Float[Array, "*N #D"],
    y0: Float[Array, "*N D"],
    y1: Float[Array, "*N D"],
    slope0: Float[Array, "*N D"],
    slope1: Float[Array, "*N D"],
) -> Float[Array, "*N D"]:
    """The cubic through `y0` and `y1` with these slopes, at the share `x` of an interval of this length."""
    start, end = slope0 * length - (y1 - y0), slope1 * length - (y1 - y0)
    return y0 + x * (y1 - y0) + x * (1 - x) * ((1 - x) * start - x * end)


def without_tangents(fn: Callable, *examples: PyTree) -> Callable:
    """`fn` without the tangents of what it closes over: a vector field may close over what is differentiated, and a first
    guess is made by loops and kernels that no derivative must enter.

    **Arguments:** the function, and examples of its arguments.
    """
    return stop_gradient(eqx.filter_closure_convert(fn, *examples))


def slope_of(
    embedded_solver: AbstractEmbeddedSolver, window: Window
) -> Callable[[Array, Float[Array, " D"]], Float[Array, " D"]]:
    """The derivative of a solution, from a time and a raveled state."""
    ravel = window.ravel
    slope = lambda t, y: ravel.ravel(embedded_solver.slope(t, ravel.unravel(y)))
    return without_tangents(slope, window.ts[0], ravel.ravel(window.y0))


def evaluate_unless(done: Bool[Array, ""], value: _Tree, other: Callable[[], _Tree]) -> _Tree:
    """`value` if it will do, else `other()`: in a batch, that is evaluated if one member needs it, and not if none does.

    (A loop of one or no turn. `cond` would evaluate it for every batch.)
    """

    def body(carry):
        return jnp.array(True), jtu.tree_map(lambda a, b: jnp.asarray(b, a.dtype), carry[1], other())

    return lax.while_loop(lambda carry: ~carry[0], body, (done, value))[1]
