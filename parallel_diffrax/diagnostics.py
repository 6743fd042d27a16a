"""What a solve did, also as a picture; what it would cost; how perturbations of a recurrence or an ODE grow; how a root
finder converges on a recurrence."""

from ._ode import (
    estimate_cost as estimate_cost,
    lyapunov_exponent as lyapunov_exponent,
    plot as plot,
    WindowStatistics as WindowStatistics,
)
from ._recurrence import (
    convergence_history as convergence_history,
    ConvergenceHistory as ConvergenceHistory,
    CostEstimate as CostEstimate,
    LyapunovEstimate as LyapunovEstimate,
    scan_lyapunov_exponent as scan_lyapunov_exponent,
)
