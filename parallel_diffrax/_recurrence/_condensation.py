"""Condensation of inner unknowns: eliminates them from an iteration on steps and inner unknowns together."""

from typing import cast

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._scan import preceded_by
from ._recurrence import Recurrence
from ._stages import LinearisedStep


class StageCondensation(eqx.Module):
    """One Newton iteration on the inner unknowns `w` of all steps, which leaves a recurrence of the states `y`: its residual
    is `r`, and `step` are all steps as affine functions."""

    recurrence: Recurrence
    y: Float[Array, " N D"]
    w: Float[Array, " N S D"]
    r: Float[Array, " N D"]
    step: LinearisedStep

    @classmethod
    def at(cls, recurrence: Recurrence, y, w) -> "StageCondensation":
        """The condensation at an iterate."""
        return cls(recurrence, y, w, *recurrence.linearised(y, w))

    def linear(self, y):
        """The residual as an affine function of the states."""
        return self.r + self._times(self.step.matrix, "nij,nj->ni", y) - (y - self.y), None

    def residual(self, y):
        """The residual at the states `y`. The inner unknowns follow the states linearly, and make another Newton iteration
        there."""
        return self.recurrence.linearised(y, self._followed(y))[0], None

    def follow(self, y, applied):
        """The inner unknowns of the next iterate. A step from a state that was not updated gets a new guess."""
        w = self._followed(y)
        usable = applied & preceded_by(True, applied) & jnp.all(jnp.isfinite(w), axis=(1, 2))
        return jnp.where(usable[:, None, None], w, cast(Array, self.recurrence.guess_stages(y)))

    def _followed(self, y):
        return self.w + self.step.shift + self._times(self.step.slope, "nsij,nj->nsi", y)

    def _times(self, matrices, subscripts, y):
        change = self.recurrence.previous(y) - self.recurrence.previous(self.y)
        return jnp.einsum(subscripts, matrices, change, precision="highest")
