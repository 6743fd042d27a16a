"""How `ELK` damps its steps: the damping, and which mean of the Kalman model its step is."""

import abc
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._scan import AbstractScan, AbstractTransitions, kalman_filter, kalman_smoother


_Scalar = Float[Array, ""]


class AbstractDamping(eqx.Module):
    """A rule for the damping `l` in `(L^T L + l) d = L^T r`, with a state of one number.

    If `adapts`, damping rises after a rejection; otherwise only updates that are not finite are rejected.
    """

    adapts: ClassVar[bool]

    @abc.abstractmethod
    def initial_state(self, dtype) -> _Scalar:
        """The state before the first iteration."""

    @abc.abstractmethod
    def damping(self, state: _Scalar, relative_merit: _Scalar) -> _Scalar:
        """The damping `l` of an iteration. `relative_merit` is `|r|^2 / (|y|^2 + |y + r|^2)`, which measures how far the
        iterate is from a solution."""

    @abc.abstractmethod
    def next_state(self, state: _Scalar, trust: _Scalar, accepted: Bool[Array, ""]) -> _Scalar:
        """The state after an iteration. `trust` says how well the linearisation predicted the residual, at best 1;
        `accepted`, whether the update was accepted."""


def _check_positive(name, field, value, or_zero=False):
    # Written so that NaN fails.
    if isinstance(value, (int, float)) and not (value >= 0 if or_zero else value > 0):
        raise ValueError(
            f"`{name}({field}={value!r})`: expected a {'number of at least 0' if or_zero else 'positive number'}."
        )


class FixedDamping(AbstractDamping):
    """The same damping in every iteration.

    The best value depends on the problem and its length, and convergence is linear, at best by a factor `l` per iteration.
    `AdaptiveDamping` needs no such choice.

    **Arguments:** `value`, the damping `l`, at least 0. With 0, the updates are those of Newton's method.

    **Raises:** `ValueError` for a negative value.
    """

    value: float | _Scalar
    adapts: ClassVar[bool] = False

    def __check_init__(self):
        _check_positive("FixedDamping", "value", self.value, or_zero=True)

    def initial_state(self, dtype):
        return jnp.asarray(self.value, dtype)

    def damping(self, state, relative_merit):
        del relative_merit
        return state

    def next_state(self, state, trust, accepted):
        del trust, accepted
        return state


class AdaptiveDamping(AbstractDamping):
    """Damping in proportion to the squared residual: `l = m |r|^2 / (|y|^2 + |F(y)|^2)`.

    It suppresses an amplification of residuals beyond the size of the states, for any problem and any length. It vanishes
    with the residual, so that convergence stays quadratic. The factor `m` doubles if the linearisation predicted the outcome
    poorly (trust below `low`), halves if it predicted it well (trust above `high`), and grows tenfold after a rejected
    update.

    **Arguments:** `initial`, the first `m`; `low` and `high`, the bounds of the trust between which `m` does not change.

    The defaults were chosen on ten recurrences from constant guesses, among them van der Pol, FitzHugh-Nagumo,
    Lotka-Volterra, Lorenz, gated networks and Langevin chains. The number of iterations depends little on them.

    **Raises:** `ValueError` for an `initial` that is not positive, and for `low >= high`.

    ??? cite "References"

        Fan and Yuan, "On the quadratic convergence of the Levenberg-Marquardt method without nonsingularity assumption",
        Computing 74 (2005): the proportion to the squared residual.

        Nocedal and Wright, "Numerical Optimization", chapter 10: the adaptation.
    """

    initial: float | _Scalar = 0.1
    low: float = 0.0
    high: float = 0.9
    adapts: ClassVar[bool] = True

    def __check_init__(self):
        _check_positive("AdaptiveDamping", "initial", self.initial)
        if not self.low < self.high:
            raise ValueError(f"`AdaptiveDamping(low={self.low!r}, high={self.high!r})`: `low` must be below `high`.")

    def initial_state(self, dtype):
        return jnp.asarray(self.initial, dtype)

    def damping(self, state, relative_merit):
        return state * relative_merit

    def next_state(self, state, trust, accepted):
        factor = jnp.where(trust < self.low, 2, jnp.where(trust > self.high, 0.5, 1))
        factor = jnp.where(accepted, factor, 10)
        return jnp.clip(state * factor, 1e-12, 1e12).astype(state.dtype)


class AbstractEstimator(eqx.Module):
    """A damped solution of `L d = r`.

    `monotone` says whether the update minimises a model of the merit `|r|^2`, so that an update that raises it can be
    rejected. `causal` says whether a step's update depends on earlier steps alone.
    """

    monotone: ClassVar[bool]
    causal: ClassVar[bool]

    @abc.abstractmethod
    def mean(
        self, transitions: AbstractTransitions, r: Float[Array, " N D"], damping: Float[Array, " N"], scan: AbstractScan
    ) -> Float[Array, " N D"]:
        """The update `d`, from the damping of every step."""

    @abc.abstractmethod
    def trust(self, merit: _Scalar, predicted: _Scalar, actual: _Scalar, model_error: _Scalar) -> _Scalar:
        """How well the linearisation predicted the outcome, at best 1. `merit` is `|r|^2` before the update, `predicted` and
        `actual` its values after it, and `model_error` the squared norm of the difference of the two residuals."""


class KalmanFilter(AbstractEstimator):
    """The filter's mean: a damped update that depends on earlier steps alone.

    It equals Newton's update as long as all earlier residuals are zero. After `k` iterations the first `k` steps are exact,
    as with Newton's method. It minimises no merit. The trust is one minus the ratio of the model's squared error to the
    squared residual.

    **Cost:** one scan of Kalman elements.
    """

    monotone: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    def mean(self, transitions, r, damping, scan):
        return kalman_filter(transitions, r, damping, scan)[0]

    def trust(self, merit, predicted, actual, model_error):
        del actual
        return 1 - model_error / jnp.maximum(merit, predicted)


class KalmanSmoother(AbstractEstimator):
    """The smoother's mean: the Levenberg-Marquardt update, which minimises `|L d - r|^2 + l |d|^2`.

    The trust is the ratio of the actual to the predicted reduction of the merit `|r|^2`. An update that raises the merit is
    rejected, so that the merit never rises. Later steps affect earlier ones: no part of the sequence is exact before the
    whole nearly is.

    On recurrences with a growing part it makes slow progress. A kink, which is one step with a large residual between two
    segments with small ones, has a lower merit than the states through which it would have to move.

    **Cost:** one scan of Kalman elements and one affine scan.
    """

    monotone: ClassVar[bool] = True
    causal: ClassVar[bool] = False

    def mean(self, transitions, r, damping, scan):
        return kalman_smoother(transitions, r, damping, scan)

    def trust(self, merit, predicted, actual, model_error):
        del model_error
        return (merit - actual) / (merit - predicted)


def damping_profile(
    estimator: AbstractEstimator, damping: _Scalar, num_solved: Int[Array, ""], num_steps: int
) -> Float[Array, " N"]:
    """The damping of every step. A causal estimator needs none up to the first unsolved step, and these are then exact."""
    profile = jnp.full(num_steps, damping)
    return jnp.where(jnp.arange(num_steps) <= num_solved, 0, profile) if estimator.causal else profile
