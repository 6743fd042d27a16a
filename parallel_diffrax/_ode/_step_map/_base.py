"""The interface of every step map."""

import abc
from typing import cast

import diffrax as dfx
import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..._recurrence import AbstractStages


class StepOutput(eqx.Module):
    """One step's outcome, as `diffrax.AbstractSolver.step` returns it, without the solver's state.

    **Attributes:** `y1`, the state at the end; `y_error`, the embedded error estimate or `None`; `dense_info`, the
    arguments of the solver's `interpolation_cls`; `result`, whether the step itself succeeded.
    """

    y1: PyTree
    y_error: PyTree
    dense_info: dict
    result: dfx.RESULTS


def _is_ordinary(term: dfx.AbstractTerm) -> bool:
    # Diffrax wraps every term in one that knows the direction of time.
    inner = getattr(term, "term", term)
    if isinstance(inner, dfx.MultiTerm):
        return all(map(_is_ordinary, inner.terms))
    return isinstance(inner, dfx.ODETerm)


class AbstractStepMap(eqx.Module):
    """One step of a base solver, `y1 = Phi(t0, t1, y0)`: pure, safe under `vmap` and forward-mode differentiation.

    `solver` is the base solver, and `terms` are what it steps. Where it has a memory, `y0` and `y1` are pairs of a state and
    a memory.
    """

    solver: eqx.AbstractVar[dfx.AbstractSolver]
    terms: eqx.AbstractVar[PyTree[dfx.AbstractTerm]]

    @property
    def order(self) -> int:
        """The order of convergence of the base solver on ordinary differential equations."""
        return self.solver.order(self.terms) or 0

    @property
    def explicit(self) -> bool:
        """Whether a step solves no equations."""
        return not isinstance(self.solver, dfx.AbstractImplicitSolver)

    @property
    def smooth(self) -> bool:
        """Whether solutions are those of an ordinary differential equation, with nothing rough to drive it."""
        leaves = jtu.tree_leaves(self.terms, is_leaf=lambda x: isinstance(x, dfx.AbstractTerm))
        return all(_is_ordinary(term) for term in leaves if isinstance(term, dfx.AbstractTerm))

    @property
    def single(self) -> "AbstractStepMap":
        """One step of the base solver, where this is several."""
        return self

    @property
    def num_substeps(self) -> int:
        """How many steps of the base solver this is."""
        return 1

    @property
    def has_increment(self) -> bool:
        """Whether `increment` is implemented."""
        return False

    @property
    def has_solver_state(self) -> bool:
        """Whether a step depends on more than the state at its start."""
        return False

    @property
    def stateless(self) -> "AbstractStepMap":
        """The step map that starts every step afresh."""
        return self

    def initial_solver_state(self, t0, t1, y0: PyTree) -> PyTree:
        """What the first step of a solve, from `t0` to `t1`, remembers."""
        del t0, t1, y0

    def solver_state_after(self, t0, t1, y0: PyTree) -> PyTree:
        """The memory after a step that starts afresh from `y0`."""
        raise NotImplementedError

    def begin(self, t0, y0: PyTree, memory: PyTree, made_jump) -> tuple["AbstractStepMap", PyTree]:
        """The step map for the steps from `t0` on, and the state of the recurrence there.

        **Arguments:** the time; the state; the memory; whether the vector field has just jumped.
        """
        del t0, memory, made_jump
        return self, y0

    def end(self, state: PyTree) -> tuple[PyTree, PyTree]:
        """A state of the recurrence as a state of the equation and a memory."""
        return state, None

    def increment(self, t0, t1, y0: PyTree) -> PyTree:
        """`Phi(t0, t1, y0) - y0`, computed without that difference."""
        raise NotImplementedError

    @property
    def stages(self) -> AbstractStages | None:
        """The inner unknowns of an implicit step in terms of raveled states and inputs `(t0, t1)`, if a recurrence is to
        solve for them together with the states."""
        return None

    @property
    def embedded_solver(self) -> "AbstractEmbeddedSolver | None":
        """A light step map on the same equation that estimates its error, for a loose adaptive solve; if there is one."""
        return None

    @abc.abstractmethod
    def __call__(self, t0, t1, y0: PyTree, y1: PyTree = None) -> StepOutput:
        """Steps from `t0` to `t1`, two times of the time dtype, from the state `y0`. If `y1` is given, the step is known to
        lead about there."""


class AbstractEmbeddedSolver(AbstractStepMap):
    """A step map for adaptive solves in sequence."""

    @property
    def error_order(self) -> int:
        """The power of the step size that the error estimate falls with."""
        return int(cast(float, self.solver.error_order(self.terms)))

    @abc.abstractmethod
    def slope(self, t, y: PyTree) -> PyTree:
        """The derivative of the solution through `y`."""

    @abc.abstractmethod
    def trial(self, t0, t1, y0: PyTree, slope: PyTree | None) -> tuple[PyTree, PyTree, PyTree]:
        """About one step from `y0`, where the derivative is `slope`, if that is known: the state at the end, the error
        estimate, the derivative there. Not finite, or with a large error estimate, where the step fails."""
