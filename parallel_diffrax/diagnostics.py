"""What a solve did, what it would cost, how perturbations of a recurrence or an ODE grow, and how a root finder converges on
a recurrence."""

from ._ode import (
    estimate_cost as estimate_cost,
    lyapunov_exponent as lyapunov_exponent,
    WindowStatistics as WindowStatistics,
)
from ._recurrence import (
    convergence_history as convergence_history,
    ConvergenceHistory as ConvergenceHistory,
    CostEstimate as CostEstimate,
    LyapunovEstimate as LyapunovEstimate,
    scan_lyapunov_exponent as scan_lyapunov_exponent,
)
