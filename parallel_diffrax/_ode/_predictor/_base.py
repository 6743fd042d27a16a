"""The interface of every predictor, and the initial state as a guess."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from ..._recurrence import Prediction, Recurrence
from .._window import Window


class AbstractPredictor(eqx.Module):
    """Makes the first guess of the states of a window. A guess is never differentiated."""

    def prepare(self, window: Window) -> "tuple[Float[Array, ' N1'] | None, AbstractPredictor]":
        """Chooses the fine steps of a window, given without tangents, before it is solved. By default it keeps them.

        **Returns:** the ends of the fine steps, or `None` to keep them; the predictor to use
        for this window.
        """
        del window
        return None, self

    @property
    def stored_windows(self) -> int:
        """The number of windows whose trajectory is kept for the next solve."""
        return 0

    @property
    def predicts_at_once(self) -> bool:
        """Whether `predict_at_once` is implemented, without which steps in parallel are not made by multiple shooting."""
        return False

    def predict_at_once(self, window: Window, recurrence: Recurrence, start_level: Int[ArrayLike, ""]) -> Prediction:
        """As `predict`, without trials, for a `window` whose steps are intervals of several fine steps
        (`Window.in_intervals`). An attempt from a guess that is not good is followed by another from `finer_level`."""
        raise NotImplementedError

    def guess(self, window: Window, trajectory: Float[Array, " N D"] | None) -> Callable:
        """The function that `solve_recurrence` calls for the first guess of each segment of the window.

        **Arguments:** the window, without tangents; its states in the previous solve, NaN where unknown, or `None` if
        `stored_windows` is zero.
        """
        del trajectory
        return WindowGuess(self, window)

    @abc.abstractmethod
    def predict(self, window: Window, recurrence: Recurrence, start_level: Int[ArrayLike, ""]) -> Prediction:
        """A first guess of all states of a window.

        **Arguments:** all without tangents.

        - `window`: the solver's window, or a segment of it (`Window.segment`). Its arrays may have room for more than
            `window.count` steps.
        - `recurrence`: the fine steps of `window`.
        - `start_level`: zero, or the start level that the prediction for the previous segment returned.
        """


class ConstantPredictor(AbstractPredictor):
    """Guesses that every state is the initial one, at no cost.

    Use it for short windows and linear problems. It is poor for oscillations.
    """

    def predict(self, window, recurrence, start_level):
        y = jnp.broadcast_to(recurrence.init, (recurrence.length, *recurrence.init.shape))
        return Prediction(y, jnp.array(0), jnp.array(recurrence.length), jnp.asarray(start_level))

    @property
    def predicts_at_once(self):
        return True

    def predict_at_once(self, window, recurrence, start_level):
        return self.predict(window, recurrence, start_level)


class WindowGuess(eqx.Module):
    """The guesses of a predictor for the segments of a window, as the function that `solve_recurrence` calls."""

    predictor: AbstractPredictor
    window: Window

    @property
    def supports_intervals(self) -> bool:
        """Whether `in_intervals` makes guesses."""
        step_map = self.window.step_map
        plain = step_map.explicit and not step_map.has_solver_state and step_map.single is step_map
        return plain and self.predictor.predicts_at_once

    def in_intervals(self, segment: Recurrence, start, count, length: int, start_level) -> Prediction:
        """A guess for the `count` steps from step `start`, in intervals of `length`, which are the steps of `segment`."""
        window = self.window.segment(start, segment.init, count, segment.length * length).in_intervals(length)
        return self.predictor.predict_at_once(window, segment, start_level)

    def __call__(self, segment, start, count, start_level):
        window = self.window.segment(start, segment.init, count, segment.length)
        if not window.step_map.has_solver_state:
            return self.predictor.predict(window, segment, start_level)
        # Steps that start afresh predict the states. The solver state is then the one that each such fine step leaves. (The
        # solver state after a large step says nothing about that after a small one, so a coarse grid cannot carry it.)
        fresh = window.stateless()
        recurrence = fresh.recurrence()
        recurrence = eqx.tree_at(lambda r: r.active, recurrence, segment.active, is_leaf=lambda x: x is None)
        prediction = self.predictor.predict(fresh, recurrence, start_level)

        def complete(t0, t1, before, y):
            solver_state = window.step_map.solver_state_after(t0, t1, fresh.ravel.unravel(before))
            return window.ravel.ravel((fresh.ravel.unravel(y), solver_state))

        y = jax.vmap(complete)(window.ts[:-1], window.ts[1:], recurrence.previous(prediction.y), prediction.y)
        return eqx.tree_at(lambda p: p.y, prediction, y)
