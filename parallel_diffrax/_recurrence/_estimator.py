"""Which mean of the Kalman model is taken as the damped step of `ELK`."""

import abc
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._scan import AbstractScan, AbstractTransitions, kalman_filter, kalman_smoother


class AbstractEstimator(eqx.Module):
    """A damped solution of `L d = r`.

    `monotone` tells whether the step minimises a model of the merit `|r|^2`, so that one which raises it can be rejected;
    `causal`, whether a step's update depends on earlier steps alone.
    """

    monotone: ClassVar[bool]
    causal: ClassVar[bool]

    @abc.abstractmethod
    def mean(
        self, transitions: AbstractTransitions, r: Float[Array, " N D"], damping: Float[Array, " N"], scan: AbstractScan
    ) -> Float[Array, " N D"]:
        """The update `d`."""

    @abc.abstractmethod
    def trust(
        self,
        merit: Float[Array, ""],
        predicted: Float[Array, ""],
        actual: Float[Array, ""],
        model_error: Float[Array, ""],
    ) -> Float[Array, ""]:
        """How well the linearisation foretold the outcome, 1 at best.

        **Arguments:** `|r|^2` before the step, predicted after it, found after it; and the squared norm of the difference
        between the residual found and the one predicted.
        """


class KalmanFilter(AbstractEstimator):
    """The filter's mean: causal. A damped step that nothing in the future holds back, and that is Newton's wherever
    residuals so far are zero: after `k` iterations the first `k` steps are exact, as for Newton's method.

    It minimises no merit; the trust is one minus the model's squared error in relation to the residual's.

    **Arguments:** none. Cost: one scan of Kalman elements.
    """

    monotone: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    def mean(self, transitions, r, damping, scan):
        return kalman_filter(transitions, r, damping, scan)[0]

    def trust(self, merit, predicted, actual, model_error):
        del actual
        return 1 - model_error / jnp.maximum(merit, predicted)


class KalmanSmoother(AbstractEstimator):
    """The smoother's mean: the Levenberg-Marquardt step, which minimises `|L d - r|^2 + l |d|^2`. The trust is the ratio of
    the actual to the predicted reduction of the merit `|r|^2`, and a step that raises the merit is rejected, so that the
    merit never rises. Later steps pull on earlier ones: no part of the sequence is exact before the whole is nearly so.

    On recurrences with a growing part it makes slow progress: a kink, one step with a large residual between two segments
    that fit, lowers the merit more than what would move it.

    **Arguments:** none. Cost: one scan of Kalman elements and one affine scan.
    """

    monotone: ClassVar[bool] = True
    causal: ClassVar[bool] = False

    def mean(self, transitions, r, damping, scan):
        return kalman_smoother(transitions, r, damping, scan)

    def trust(self, merit, predicted, actual, model_error):
        del model_error
        return (merit - actual) / (merit - predicted)


def damping_profile(
    estimator: AbstractEstimator, damping: Float[Array, ""], num_solved: Int[Array, ""], num_steps: int
) -> Float[Array, " N"]:
    """The damping of every step: none up to the first that is not solved, if that makes these exact."""
    profile = jnp.full(num_steps, damping)
    if not estimator.causal:
        return profile
    return jnp.where(jnp.arange(num_steps) <= num_solved, 0, profile)
