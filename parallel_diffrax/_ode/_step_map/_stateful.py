"""Multi-step and other stateful methods: the recurrence carries the solver state beside the state of the equation."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._base import AbstractStepMap, StepOutput
from ._generic import GenericStep, innermost


# The state of these solvers only caches values that `init` computes from the arguments of the step, so a fresh `init` in
# every step changes nothing. Any other solver state is part of the recurrence.
_STATELESS = (dfx.AbstractRungeKutta, dfx.AbstractSRK, dfx.AbstractFosterLangevinSRK)


class StatefulStep(AbstractStepMap):
    """A step of a Diffrax solver that depends on more than the state at its start, for example `diffrax.LeapfrogMidpoint`.

    The recurrence is `(y1, s1) = Phi(t0, t1, (y0, s0))` with the solver state `s`. The first step of a solve starts from
    the solver's `init`, and each window from the solver state at the end of the previous window. First guesses are made by
    steps that start afresh (`stateless`), and completed by the solver state that such a step leaves. Each number in the
    solver state is one more unknown a step. The step from `jump_time`, where the vector field has just jumped, is made with
    `made_jump=True`.
    """

    solver: dfx.AbstractSolver
    terms: PyTree[dfx.AbstractTerm]
    args: PyTree
    jump_time: Array | None = None

    @staticmethod
    def supports(solver: dfx.AbstractSolver, terms, y0, args, time_dtype) -> bool:
        """Whether the state of the solver is more than a cache.

        **Raises:** `ValueError` if it contains anything but floating-point numbers.
        """
        if isinstance(innermost(solver), _STATELESS):
            return False
        t = jax.ShapeDtypeStruct((), time_dtype)
        leaves = jtu.tree_leaves(eqx.filter_eval_shape(solver.init, terms, t, t, y0, args))
        for leaf in leaves:
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise ValueError(
                    f"`ParallelSolver({type(solver).__name__}(), ...)`: the solver carries a state of dtype {leaf.dtype} "
                    "from step to step. Steps in parallel need a solver state of floating-point numbers. Use another "
                    "solver, or this one without `ParallelSolver`."
                )
        return len(leaves) > 0

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
        output = self._step(t0, t1, y, solver_state, False if self.jump_time is None else t0 == self.jump_time)
        # The steps after the last one of a window have length zero. A step that reaches back would still change the state.
        kept = jtu.tree_map(lambda old, new: jnp.where(t0 == t1, jnp.asarray(old, new.dtype), new), y0, output.y1)
        return eqx.tree_at(lambda output: output.y1, output, kept)

    def _step(self, t0, t1, y0, solver_state, made_jump) -> StepOutput:
        y1, y_error, dense_info, solver_state, result = self.solver.step(
            self.terms, t0, t1, y0, self.args, solver_state, made_jump=made_jump
        )
        return StepOutput((y1, solver_state), y_error, dense_info, result)
