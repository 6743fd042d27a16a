"""What a recurrence or an equation does to perturbations, and how a root finder converges on it."""

from ._ode import (
    lyapunov_exponent as lyapunov_exponent,
)
from ._recurrence import (
    convergence_history as convergence_history,
    ConvergenceHistory as ConvergenceHistory,
    LyapunovEstimate as LyapunovEstimate,
    scan_lyapunov_exponent as scan_lyapunov_exponent,
)
