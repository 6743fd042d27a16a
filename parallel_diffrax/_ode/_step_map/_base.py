"""The interface of every step map."""

import abc

import diffrax as dfx
import equinox as eqx
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


class AbstractStepMap(eqx.Module):
    """One step of a base solver, `y1 = Phi(t0, t1, y0)`: pure, without state, safe under `vmap` and forward-mode
    differentiation."""

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
