"""Multi-step and other stateful methods, whose own state is carried from step to step with that of the equation."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._base import AbstractStepMap, StepOutput
from ._generic import GenericStep, innermost, prepare, state_structure


# Solvers whose state only caches what `init` computes from the step's own arguments, so that calling `init` afresh for
# every step changes nothing. Any other state is part of the recurrence.
_STATELESS = (dfx.AbstractRungeKutta, dfx.AbstractSRK, dfx.AbstractFosterLangevinSRK)


class StatefulStep(AbstractStepMap):
    """A step of a Diffrax solver that depends on more than the state at its start, such as `diffrax.LeapfrogMidpoint`:
    the recurrence is `(y1, memory1) = Phi(t0, t1, (y0, memory0))`, where the memory is the solver's own state.

    The first step of a solve starts from the solver's `init`, and each window from the memory at the end of the one before.
    First guesses are made by steps that forget (`stateless`), and completed by the memory that such a step leaves.

    **Arguments:** the base solver, made differentiable by `StatefulStep.make`; `terms` and `args`; the time at which the
    vector field has just jumped, or `None`: the solver is told so in the step that starts there.

    Cost: as many more unknowns a step as there are numbers in the memory.
    """

    solver: dfx.AbstractSolver
    terms: PyTree[dfx.AbstractTerm]
    args: PyTree
    jump_time: Array | None = None

    @classmethod
    def supports(cls, solver: dfx.AbstractSolver, terms, y0, args) -> bool:
        """Whether the solver has a state that is more than a cache."""
        if isinstance(innermost(solver), _STATELESS):
            return False
        return len(jtu.tree_leaves(state_structure(solver, terms, y0, args))) > 0

    @classmethod
    def make(cls, solver: dfx.AbstractSolver, terms, y0, args, root_finder) -> "StatefulStep":
        """The step map of `solver`, with its options set as by `GenericStep.make`.

        **Raises:** `ValueError` if its state holds anything but floating-point numbers.
        """
        for leaf in jtu.tree_leaves(state_structure(solver, terms, y0, args)):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise ValueError(
                    f"`ParallelSolver({type(solver).__name__}(), ...)`: the solver carries a state of dtype {leaf.dtype} "
                    "from step to step. Steps can be solved in parallel if all that they carry are floating-point "
                    "numbers. Use another solver, or this one by itself without `ParallelSolver`."
                )
        return cls(prepare(solver, root_finder), terms, args)

    @property
    def has_solver_state(self):
        return True

    @property
    def stateless(self) -> GenericStep:
        return GenericStep(self.solver, self.terms, self.args)

    def initial_solver_state(self, t0, t1, y0):
        return self.solver.init(self.terms, t0, t1, y0, self.args)

    def solver_state_after(self, t0, t1, y0):
        return self._step(t0, t1, y0, self.initial_solver_state(t0, t1, y0), True).y1[1]

    def begin(self, t0, y0, memory, made_jump):
        # Diffrax knows, for most controllers, that there are no jumps.
        never = isinstance(made_jump, bool) and not made_jump
        jump_time = None if never else jnp.where(made_jump, t0, jnp.nan)
        return eqx.tree_at(lambda s: s.jump_time, self, jump_time, is_leaf=lambda x: x is None), (y0, memory)

    def end(self, state):
        return state

    def __call__(self, t0, t1, y0, y1=None):
        del y1
        y, memory = y0
        return self._step(t0, t1, y, memory, False if self.jump_time is None else t0 == self.jump_time)

    def _step(self, t0, t1, y0, memory, made_jump) -> StepOutput:
        y1, y_error, dense_info, memory, result = self.solver.step(
            self.terms, t0, t1, y0, self.args, memory, made_jump=made_jump
        )
        return StepOutput((y1, memory), y_error, dense_info, result)
