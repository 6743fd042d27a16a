"""How strongly `ELK` damps its steps, and which mean of the Kalman model its step is.

`ELK(damping=AdaptiveDamping(), estimator=KalmanFilter())` is the default. To write another rule, subclass `AbstractDamping` or
`AbstractEstimator`.
"""

from ._recurrence import (
    AbstractDamping as AbstractDamping,
    AbstractEstimator as AbstractEstimator,
    AdaptiveDamping as AdaptiveDamping,
    FixedDamping as FixedDamping,
    KalmanFilter as KalmanFilter,
    KalmanSmoother as KalmanSmoother,
)
