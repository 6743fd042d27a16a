"""Levenberg-Marquardt's method on all steps of a recurrence at once, by Kalman scans."""

from collections.abc import Callable

import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from .._scan import AbstractScan, AutoScan, check_instance, row_at, shift
from ._damping import AbstractDamping, AbstractEstimator, AdaptiveDamping, damping_profile, KalmanFilter
from ._jacobians import AbstractJacobian, Dense
from ._root_finder import AbstractParallelRootFinder
from ._tolerance import num_leading_true


class ELK(AbstractParallelRootFinder):
    """Evaluating Levenberg-Marquardt via Kalman: damped Newton iterations on all steps of a recurrence, each one associative
    scan.

    Use it if the guess is poor. From a good one, `ParallelNewton` converges in as many iterations, which are cheaper. It
    runs wherever `ParallelNewton` does.

    Newton's update solves `L d = r`, and grows like products of Jacobians. From a poor guess it overflows on a recurrence
    with a growing part. The update of `ELK` is a mean of the linear-Gaussian model

        d[i] = A[i] d[i-1] + r[i] + w[i],   w[i] ~ N(0, I);       0 = d[i] + v[i],   v[i] ~ N(0, I / l).

    With `KalmanSmoother()` it minimises `|L d - r|^2 + l |d|^2`: Levenberg-Marquardt's update. With `KalmanFilter()` it is
    the mean given the past. That is as well damped, moves information forward without delay, and keeps the first `k` steps
    exact after `k` iterations. The filter is the default because it performs better: from constant guesses it took 9 to 47
    iterations on the five unstable recurrences of `benchmarks/family.py`. On four of these the smoother had not converged
    after 200.

    Norms are Euclidean, over all steps and components: scale components of very different size to similar ones. Every
    iterate is finite. If a step cannot be evaluated, those before it are solved by themselves, and those after it keep the
    last good state.

    **Arguments:**

    - `rtol`, `atol`, `norm`: as for `ParallelNewton` with an approximate Jacobian: the sum of all later updates, at the
        measured rate of convergence, is small for every step.
    - `jacobian`: replaces `A`. Diagonal approximations give quasi-ELK, whose scan treats each component by itself.
    - `damping`: chooses `l`: `AdaptiveDamping()` or `FixedDamping(l)`.
    - `estimator`: `KalmanFilter()` or `KalmanSmoother()`.
    - `scan`: evaluates the filter and the smoother; as for `ParallelNewton`. (On a CPU, `AssociativeScan` takes a minute to
        compile.)

    **Results:** `successful` when converged, by the criteria of `ParallelNewton`. `nonlinear_divergence` if the first step
    that has not converged cannot be evaluated. `nonlinear_max_steps_reached`. A rejected update counts as an iteration.

    **Statistics:** as for `ParallelNewton`. `SolveRequest.monitor_contraction` has no effect.

    **Cost:** per iteration: the linearisation; about `8 D b^2` multiplications a step, and eliminations in `b x b` systems,
    for blocks of size `b` (`D` for `Dense()`, 1 for diagonal approximations); one more evaluation of all steps; depth
    `2 log2 N`; memory `N D (3 b + 2)` a few times.

    **Raises:** as for `ParallelNewton`; `TypeError` for a `damping` or `estimator` of another kind.

    ??? cite "References"

        Gonzalez, Warrington, Smith, Linderman, "Towards scalable and stable parallelization of nonlinear RNNs",
        NeurIPS 2024, arXiv 2407.19115.

        Särkkä and Svensson, "Levenberg-Marquardt and line-search extended Kalman smoothers", ICASSP 2020.
    """

    rtol: float | Float[Array, ""] = 1e-8
    atol: float | Float[Array, ""] = 0.0
    norm: Callable[[PyTree], Float[Array, ""]] = optx.max_norm
    jacobian: AbstractJacobian = Dense()
    damping: AbstractDamping = AdaptiveDamping()
    estimator: AbstractEstimator = KalmanFilter()
    scan: AbstractScan = AutoScan()

    def __check_init__(self):
        check_instance("ELK", "damping", self.damping, AbstractDamping, "AdaptiveDamping()")
        check_instance("ELK", "estimator", self.estimator, AbstractEstimator, "KalmanFilter()")

    @property
    def exact(self):
        return False

    def initial_method_state(self, y):
        return self.damping.initial_state(y.dtype)

    def iterate(self, residual, r, transitions, y, tolerance, largest, method_state):
        index = jnp.arange(y.shape[0])
        # The system ends before the first step that cannot be evaluated.
        num_evaluable = num_leading_true(transitions.finite() & jnp.all(jnp.isfinite(r), axis=1))
        evaluable = index < num_evaluable
        transitions, r = transitions.where(evaluable), jnp.where(evaluable[:, None], r, 0)
        scale = tolerance.scale(y)
        num_solved = num_leading_true(tolerance.at_rounding(r, scale))

        merit = jnp.sum(r**2)
        size = jnp.sum(jnp.where(evaluable[:, None], y**2 + (y + r) ** 2, 0))
        relative = jnp.where(merit > 0, merit / jnp.where(size > 0, size, 1), 0)
        profile = damping_profile(self.estimator, self.damping.damping(method_state, relative), num_solved, y.shape[0])
        d = jnp.where(evaluable[:, None], self.estimator.mean(transitions, r, profile, self.scan), 0)

        stepped = y + d
        new_r = jnp.where(evaluable[:, None], residual(stepped)[0], 0)
        predicted_r = r - d + transitions.apply(shift(d))
        predicted, actual = jnp.sum(predicted_r**2), jnp.sum(new_r**2)
        trust = self.estimator.trust(merit, predicted, actual, jnp.sum((new_r - predicted_r) ** 2))

        accepted = jnp.all(jnp.isfinite(stepped) & jnp.isfinite(new_r))
        if self.damping.adapts:
            accepted = accepted & jnp.all(jnp.abs(d) <= largest)
        if self.damping.adapts and self.estimator.monotone:
            # Below this floor the merit is rounding.
            floor = jnp.sum((8 * tolerance.eps * scale) ** 2)
            accepted = accepted & ((actual <= merit) | (jnp.maximum(actual, merit) <= floor))
        method_state = self.damping.next_state(method_state, jnp.where(merit > 0, trust, 1), accepted)

        # The exact leading part of a rejected update is applied too.
        sure = (index <= num_solved) & jnp.all(jnp.isfinite(stepped), axis=1)
        applied = evaluable & (accepted | (sure if self.estimator.causal else False))
        new_y = jnp.where(applied[:, None], stepped, y)
        last = row_at(new_y, jnp.maximum(num_evaluable - 1, 0))
        return jnp.where(evaluable[:, None], new_y, last[None]), d, applied, method_state
