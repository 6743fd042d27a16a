"""Verification of what a root finder found, by the equations themselves."""

import equinox as eqx
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float

from .._scan import AbstractTransitions, DenseTransitions
from ._jacobians import AbstractJacobian
from ._recurrence import Recurrence
from ._tolerance import effective_scale, Tolerance


class Verification(eqx.Module):
    """States put into the equations of all steps. `satisfied` says whether the equations of all steps up to each one hold;
    `relative_defect` is the magnitude of the defect relative to the scale of the states."""

    defect: Float[Array, " C D"]
    satisfied: Bool[Array, " C"]
    relative_defect: Float[Array, " C D"]
    transitions: AbstractTransitions | None

    @classmethod
    def of(
        cls,
        recurrence: Recurrence,
        y: Float[Array, " C D"],
        rounding_size: Float[Array, " C D"] | None,
        root_finder: optx.AbstractRootFinder,
        eps: float,
        jacobian: AbstractJacobian | None = None,
        stages: Float[Array, " C S D"] | None = None,
    ) -> "Verification":
        """Verifies the states `y` that a root finder found, by one evaluation of all steps. If `jacobian`, which is exact,
        is given, by one linearisation with its `transitions`. `rounding_size` and `stages` are those of its report."""
        transitions, stages_resolved = None, True
        tolerance = Tolerance(root_finder.rtol, root_finder.atol, root_finder.norm, eps)
        scale = tolerance.scale(y)
        size = scale if rounding_size is None else rounding_size
        scale = effective_scale(scale, size)
        if stages is not None:
            # The defect is that after one more iteration on the inner unknowns. Its error is the square of their last
            # change.
            defect, step = recurrence.linearised(y, stages)
            resolved = [tolerance.resolved(step.shift[:, i], scale, size) for i in range(step.shift.shape[1])]
            stages_resolved = jnp.all(jnp.stack(resolved), axis=0)
            transitions = None if jacobian is None else DenseTransitions(step.matrix)
        elif jacobian is not None:
            defect, transitions, _ = jacobian.linearise(lambda y: (recurrence.residual(y), None), y)
        else:
            defect = recurrence.residual(y)
        relative = jnp.where(defect == 0, 0, jnp.abs(defect) / jnp.where(scale > 0, scale, 1))
        satisfied = tolerance.satisfied(defect, scale, size) & stages_resolved
        return cls(defect, satisfied, relative, transitions)
