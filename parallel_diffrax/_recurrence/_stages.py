"""Steps that solve equations of their own: their inner unknowns, and one Newton iteration on them."""

import abc

import equinox as eqx
from jaxtyping import Array, Float, PyTree


class LinearisedStep(eqx.Module):
    """A step `y1 = F(y0)`, defined by equations `g(y0, w) = 0` for inner unknowns `w` (the stages of an implicit method),
    after one Newton iteration on them from `w`, as an affine function of a change `d` of `y0`.

    **Attributes:** with `S` inner unknowns of the size `D` of a state,

    - `value`, `matrix`: `y1 = value + matrix @ d`, or the increment `y1 - y0` at `d = 0` as `value`; shapes `(D,)`,
        `(D, D)`.
    - `shift`, `slope`: the new inner unknowns are `w + shift + slope @ d`; shapes `(S, D)`, `(S, D, D)`.
    """

    value: Float[Array, " D"]
    matrix: Float[Array, " D D"]
    shift: Float[Array, " S D"]
    slope: Float[Array, " S D D"]


class AbstractStages(eqx.Module):
    """The inner unknowns of the steps of a recurrence. With them, steps and inner unknowns are solved for together: an
    iteration on all steps is one linearisation of the inner equations, and no iteration is nested in another."""

    @abc.abstractmethod
    def guess(self, y0: Float[Array, " D"], y1: Float[Array, " D"], x: PyTree) -> Float[Array, " S D"]:
        """The inner unknowns of a step, given about where it begins and ends, and its inputs."""

    @abc.abstractmethod
    def linearise(self, y0: Float[Array, " D"], w: Float[Array, " S D"], x: PyTree) -> LinearisedStep:
        """One Newton iteration on the inner equations of a step from `y0` with inputs `x`, at `w`."""

    @abc.abstractmethod
    def solve(self, y0: Float[Array, " D"], w: Float[Array, " S D"], x: PyTree) -> Float[Array, " D"]:
        """The step itself, its inner equations solved by iteration from `w`: as `Recurrence.map`, a differentiable function
        of `y0` and `x`. Not finite where that does not converge."""
