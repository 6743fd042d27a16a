"""The interface of every step map."""

import abc

import diffrax as dfx
import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree


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
    """One step of a base solver, `y1 = Phi(t0, t1, y0)`: pure, without state, safe under `vmap` and forward-mode
    differentiation.

    `solver` is the base solver, and `terms` are what it steps.
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
    def has_increment(self) -> bool:
        """Whether `increment` is implemented."""
        return False

    def increment(self, t0, t1, y0: PyTree) -> PyTree:
        """`Phi(t0, t1, y0) - y0`, computed without that difference."""
        raise NotImplementedError

    @abc.abstractmethod
    def __call__(self, t0, t1, y0: PyTree) -> StepOutput:
        """Steps from `t0` to `t1`, two times of the time dtype, from the state `y0`."""
