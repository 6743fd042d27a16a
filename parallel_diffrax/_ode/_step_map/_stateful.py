"""Multi-step and other stateful methods: the recurrence carries the solver state beside the state of the equation."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._base import AbstractStepMap, StepOutput
from ._generic import GenericStep, innermost, prepare, state_structure


# The state of these solvers only caches values that `init` computes from the arguments of the step, so a fresh `init` in
# every step changes nothing. Any other solver state is part of the recurrence.
_STATELESS = (dfx.AbstractRungeKutta, dfx.AbstractSRK, dfx.AbstractFosterLangevinSRK)


class StatefulStep(AbstractStepMap):
    """A step of a Diffrax solver that depends on more than the state at its start, for example `diffrax.LeapfrogMidpoint`.

    The recurrence is `(y1, s1) = Phi(t0, t1, (y0, s0))` with the solver state `s`. The first step of a solve starts from
    the solver's `init`, and each window from the solver state at the end of the previous window. First guesses are made by
    steps that start afresh (`stateless`), and completed by the solver state that such a step leaves.

    **Arguments:** the base solver, made differentiable by `StatefulStep.make`; `terms` and `args`; the time at which the
    vector field has just jumped, or `None`. The step that starts there is made with `made_jump=True`.

    **Cost:** one more unknown a step for each number in the solver state.
    """

    solver: dfx.AbstractSolver
    terms: PyTree[dfx.AbstractTerm]
    args: PyTree
    jump_time: Array | None = None

    @classmethod
    def supports(cls, solver: dfx.AbstractSolver, terms, y0, args) -> bool:
        """Whether the state of the solver is more than a cache."""
        if isinstance(innermost(solver), _STATELESS):
            return False
        return len(jtu.tree_leaves(state_structure(solver, terms, y0, args))) > 0

    @classmethod
    def make(cls, solver: dfx.AbstractSolver, terms, y0, args, root_finder) -> "StatefulStep":
        """The step map of `solver`, with its options set as by `GenericStep.make`.

        **Raises:** `ValueError` if the solver state contains anything but floating-point numbers.
        """
        for leaf in jtu.tree_leaves(state_structure(solver, terms, y0, args)):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise ValueError(
                    f"`ParallelSolver({type(solver).__name__}(), ...)`: the solver carries a state of dtype {leaf.dtype} "
                    "from step to step. Steps in parallel need a solver state of floating-point numbers. Use another "
                    "solver, or this one without `ParallelSolver`."
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

    def begin(self, t0, y0, solver_state, made_jump):
        # With most controllers, Diffrax knows statically that there are no jumps.
        never = isinstance(made_jump, bool) and not made_jump
        jump_time = None if never else jnp.where(made_jump, t0, jnp.nan)
        return eqx.tree_at(lambda s: s.jump_time, self, jump_time, is_leaf=lambda x: x is None), (y0, solver_state)

    def end(self, state):
        return state

    def __call__(self, t0, t1, y0, y1=None):
        del y1
        y, solver_state = y0
        return self._step(t0, t1, y, solver_state, False if self.jump_time is None else t0 == self.jump_time)

    def _step(self, t0, t1, y0, solver_state, made_jump) -> StepOutput:
        y1, y_error, dense_info, solver_state, result = self.solver.step(
            self.terms, t0, t1, y0, self.args, solver_state, made_jump=made_jump
        )
        return StepOutput((y1, solver_state), y_error, dense_info, result)
