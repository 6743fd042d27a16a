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

from ..._recurrence import Recurrence, stop_gradient
from .._step_map import AbstractScout
from .._window import Window


_Tree = TypeVar("_Tree")


class Prediction(eqx.Module):
    """A first guess.

    **Attributes:**

    - `y`: the raveled states, shape `(N, D)`, finite.
    - `steps`: how many steps were made in sequence for it.
    - `reach`: the number of leading steps up to which it is one.
    - `hint`: what to hand in for the next part of the window, to begin where this one ended.
    """

    y: Float[Array, " N D"]
    steps: Int[Array, ""]
    reach: Int[Array, ""]
    hint: Int[Array, ""]


class AbstractPredictor(eqx.Module):
    """Where the first iterate of a window comes from. It is never differentiated."""

    def prepare(self, window: Window) -> "tuple[Float[Array, ' N1'] | None, AbstractPredictor]":
        """Before a window is solved: where its fine steps end, as fractions of the window, or `None` to leave them; and the
        predictor to use for it. Without tangents."""
        del window
        return None, self

    @property
    def max_redistributions(self) -> int:
        """How often the fine steps of a window are laid again by `revise`."""
        return 0

    def revise(self, window: Window, y: Float[Array, " N D"], y_error: PyTree):
        """Where the fine steps of a window should rather end, given its solution and the error estimate of each: the
        fractions, the predictor whose guess is that solution, and whether it is worth another solve."""
        raise NotImplementedError

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
    def predict(self, window: Window, recurrence: Recurrence, hint: Int[ArrayLike, ""]) -> Prediction:
        """A first guess of all states of the window.

        **Arguments:** the window, which may be a part of the solver's, made for more steps than it has
        (`Window.part`); its recurrence; zero, or the hint of a prediction for the part before. Without tangents.
        """


class WindowGuess(eqx.Module):
    """A predictor on the parts of a window, as `solve_recurrence` calls for it."""

    predictor: AbstractPredictor
    window: Window

    def __call__(self, stretch, start, count, hint):
        part = self.window.part(start, stretch.init, count, stretch.length)
        if part.step_map.has_memory:
            prediction = self._with_memory(part, stretch, hint)
        else:
            prediction = self.predictor.predict(part, stretch, hint)
        return prediction.y, prediction.steps, prediction.reach, prediction.hint

    def _with_memory(self, part: Window, stretch: Recurrence, hint) -> Prediction:
        """The states of a solver without memory, each with what a step there would remember. (The memory of a large
        step says nothing about that of a small one, so a coarse grid cannot carry it.)"""
        plain = part.memoryless()
        recurrence = plain.recurrence()
        recurrence = eqx.tree_at(lambda r: r.active, recurrence, stretch.active, is_leaf=lambda x: x is None)
        prediction = self.predictor.predict(plain, recurrence, hint)

        def complete(t0, t1, before, y):
            memory = part.step_map.memory_after(t0, t1, plain.ravel.unravel(before))
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


def frozen(fn: Callable, *examples: PyTree) -> Callable:
    """`fn` without the tangents of what it closes over: a vector field may close over what is differentiated, and a first
    guess is made by loops and kernels that no derivative must enter.

    **Arguments:** the function, and examples of its arguments.
    """
    return stop_gradient(eqx.filter_closure_convert(fn, *examples))


def slope_of(scout: AbstractScout, window: Window) -> Callable[[Array, Float[Array, " D"]], Float[Array, " D"]]:
    """The derivative of a solution, from a time and a raveled state."""
    ravel = window.ravel
    slope = lambda t, y: ravel.ravel(scout.slope(t, ravel.unravel(y)))
    return frozen(slope, window.ts[0], ravel.ravel(window.y0))


def unless(done: Bool[Array, ""], value: _Tree, other: Callable[[], _Tree]) -> _Tree:
    """`value` if it will do, else `other()`: in a batch, that is evaluated if one member needs it, and not if none does.

    (A loop of one or no turn. `cond` would evaluate it for every batch.)
    """

    def body(carry):
        return jnp.array(True), jtu.tree_map(lambda a, b: jnp.asarray(b, a.dtype), carry[1], other())

    return lax.while_loop(lambda carry: ~carry[0], body, (done, value))[1]
