"""Damping of `ELK`, and the estimator (Kalman filter or smoother) whose mean is its step.

`ELK(damping=AdaptiveDamping(), estimator=KalmanFilter())` is the default. To write another rule, subclass `AbstractDamping`
or `AbstractEstimator`.
"""

from ._recurrence import (
    AbstractDamping as AbstractDamping,
    AbstractEstimator as AbstractEstimator,
    AdaptiveDamping as AdaptiveDamping,
    FixedDamping as FixedDamping,
    KalmanFilter as KalmanFilter,
    KalmanSmoother as KalmanSmoother,
)
