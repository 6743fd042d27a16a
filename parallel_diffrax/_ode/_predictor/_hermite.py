"""Cubic Hermite interpolation, and the slopes that it needs."""

from collections.abc import Callable

from jaxtyping import Array, Float

from ..._recurrence import without_tangents
from .._step_map import AbstractEmbeddedSolver
from .._window import Window


def hermite(
    x: Float[Array, "*N #D"],
    length: Float[Array, "*N #D"],
    y0: Float[Array, "*N D"],
    y1: Float[Array, "*N D"],
    slope0: Float[Array, "*N D"],
    slope1: Float[Array, "*N D"],
) -> Float[Array, "*N D"]:
    """The cubic with the values `y0`, `y1` and the slopes `slope0`, `slope1` at the ends of an interval of this `length`,
    evaluated at the fraction `x` of the interval."""
    start, end = slope0 * length - (y1 - y0), slope1 * length - (y1 - y0)
    return y0 + x * (y1 - y0) + x * (1 - x) * ((1 - x) * start - x * end)


def slope_of(
    embedded_solver: AbstractEmbeddedSolver, window: Window
) -> Callable[[Array, Float[Array, " D"]], Float[Array, " D"]]:
    """The derivative of the solution as a function of a time and a raveled state, without tangents."""
    ravel = window.ravel
    slope = lambda t, y: ravel.ravel(embedded_solver.slope(t, ravel.unravel(y)))
    return without_tangents(slope, window.ts[0], ravel.ravel(window.y0))
