"""Steps that solve equations of their own: their inner unknowns, and one Newton iteration on them."""

import abc

import equinox as eqx
from jaxtyping import Array, Float, PyTree


class LinearisedStep(eqx.Module):
    """A step `y1 = F(y0)` as an affine function of a change `d` of `y0`: `y1 = y0 + value + matrix @ d`.

    Equations `g(y0, w) = 0` for `S` inner unknowns `w` (the stages of an implicit method) define the step. The affine
    function is the step after one Newton iteration on them from `w`. The new inner unknowns are `w + shift + slope @ d`.
    """

    value: Float[Array, " D"]
    matrix: Float[Array, " D D"]
    shift: Float[Array, " S D"]
    slope: Float[Array, " S D D"]


class AbstractStages(eqx.Module):
    """The inner unknowns of the steps of a recurrence. They are solved together with the states: each iteration on all steps
    linearises the inner equations once, and no iteration is nested in another."""

    @abc.abstractmethod
    def guess(self, y0: Float[Array, " D"], y1: Float[Array, " D"], x: PyTree) -> Float[Array, " S D"]:
        """A guess of the inner unknowns of a step from about `y0` to about `y1` with inputs `x`."""

    @abc.abstractmethod
    def linearise(self, y0: Float[Array, " D"], w: Float[Array, " S D"], x: PyTree) -> LinearisedStep:
        """One Newton iteration from `w` on the inner equations of a step from `y0` with inputs `x`."""

    @abc.abstractmethod
    def solve(self, y0: Float[Array, " D"], y1: Float[Array, " D"] | None, x: PyTree) -> Float[Array, " D"]:
        """The result of `Recurrence.map` by an iteration on the inner equations, differentiable in `y0` and `x`. The state
        after the step is about `y1`, if that is known. Not finite if the iteration does not converge."""
