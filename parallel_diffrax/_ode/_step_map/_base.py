"""The interface of every step map."""

import abc
from typing import cast

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..._recurrence import AbstractStages


class StepOutput(eqx.Module):
    """The outputs of `diffrax.AbstractSolver.step` for one step, without the solver state.

    **Attributes:** `y1`, the state at the end; `y_error`, the embedded error estimate, or `None`; `dense_info`, the
    arguments of the solver's `interpolation_cls`; `result`, whether the step succeeded.
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


def compiled_apart(stage: PyTree) -> PyTree:
    """The same stage of a step. On a CPU, XLA compiles the operations before it and those after it apart.

    In one loop over the members of a batch, 28 dependent selections before a square root take it 3 s to compile, and each
    one more nearly twice as long (JAX 0.11 and 0.12). A few stages of a field with jumps have more."""
    return lax.optimization_barrier(stage) if jax.default_backend() == "cpu" else stage


class AbstractStepMap(eqx.Module):
    """One step of a base solver, `y1 = Phi(t0, t1, y0)`: pure, and safe under `vmap` and forward-mode differentiation.

    Subclass it to give a solver its own step map. `ParallelSolver` uses the step map of a base solver whose type has the
    method

        def step_map(self, terms, y0, args) -> AbstractStepMap

    with `terms`, `y0` and `args` as in `diffrax.AbstractSolver.init`. It must make the steps of the solver's `step`, so a
    subclass that overrides `step` overrides `step_map` too. A solver inside a `diffrax.AbstractWrappedSolver` is not asked.

    **Attributes:** `solver`, the base solver; `terms`, the terms that it steps. If a step depends on a solver state, `y0`
    and `y1` are pairs of a state and a solver state.
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
        """Whether all terms are those of an ordinary differential equation, without noise or another rough control."""
        leaves = jtu.tree_leaves(self.terms, is_leaf=lambda x: isinstance(x, dfx.AbstractTerm))
        return all(_is_ordinary(term) for term in leaves if isinstance(term, dfx.AbstractTerm))

    @property
    def single(self) -> "AbstractStepMap":
        """One step of the base solver, if this step map makes several."""
        return self

    @property
    def num_substeps(self) -> int:
        """The number of steps of the base solver in one step."""
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
        """The step map that starts every step afresh, without a solver state."""
        return self

    def initial_solver_state(self, t0, t1, y0: PyTree) -> PyTree:
        """The solver state before the first step of a solve, which goes from `t0` to `t1`."""
        del t0, t1, y0

    def solver_state_after(self, t0, t1, y0: PyTree) -> PyTree:
        """The solver state after a step that starts afresh from `y0`."""
        raise NotImplementedError

    def begin(self, t0, y0: PyTree, solver_state: PyTree, made_jump) -> tuple["AbstractStepMap", PyTree]:
        """The step map for the steps from `t0` on, where the vector field may have just jumped, and the state of the
        recurrence there."""
        del t0, solver_state, made_jump
        return self, y0

    def end(self, state: PyTree) -> tuple[PyTree, PyTree]:
        """The state of the equation and the solver state in a state of the recurrence."""
        return state, None

    def increment(self, t0, t1, y0: PyTree) -> PyTree:
        """`Phi(t0, t1, y0) - y0`, computed without that difference."""
        raise NotImplementedError

    @property
    def stages(self) -> AbstractStages | None:
        """The inner unknowns of an implicit step, for raveled states and inputs `(t0, t1)`, if a recurrence shall solve for
        them together with the states."""
        return None

    @property
    def embedded_solver(self) -> "AbstractEmbeddedSolver | None":
        """A cheap step map with an error estimate on the same equation, for a loose adaptive solve; `None` if there is
        none."""
        return None

    @property
    def joins_steps(self) -> bool:
        """Whether the dense output of a step depends on the step before: see `joined`."""
        return False

    def joined(self, dense_info: dict, before: dict, ratio) -> dict:
        """The `dense_info` of a step, if it is known that it follows another, whose `dense_info` is `before`, without a jump
        in between. `ratio` is its length divided by that of the other."""
        del before, ratio
        return dense_info

    @abc.abstractmethod
    def __call__(self, t0, t1, y0: PyTree, y1: PyTree = None) -> StepOutput:
        """The step from `t0` to `t1`, two times of the time dtype, from the state `y0`.

        `y1`, if given, is about the state at the end. An implicit step may start its iteration there.
        """


class AbstractEmbeddedSolver(AbstractStepMap):
    """A step map with an embedded error estimate, for the loose adaptive solve of `AdaptivePredictor`."""

    @property
    def error_order(self) -> int:
        """The exponent `p` of the error estimate, which is `O(h^p)` in the step size `h`."""
        return int(cast(float, self.solver.error_order(self.terms)))

    @abc.abstractmethod
    def slope(self, t, y: PyTree) -> PyTree:
        """The derivative of the solution through `y`."""

    @abc.abstractmethod
    def trial(self, t0, t1, y0: PyTree, slope: PyTree | None) -> tuple[PyTree, PyTree, PyTree]:
        """An approximate step from the state `y0` at `t0`, with the derivative of the solution there, if known.

        **Returns:** the state at `t1`, the error estimate, the derivative at `t1`. A step that fails returns values that are
        not finite, or a large error estimate.
        """
