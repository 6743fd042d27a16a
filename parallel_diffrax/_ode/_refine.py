"""The dense output of windows as dense output over all fine steps."""

import functools as ft
from dataclasses import replace

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, Int

from .._recurrence import nan_unless, Segments
from ._interpolation import FineSteps, WindowInterpolation


# The entry of `Solution.stats` with the `Layout` of a refined solution.
LAYOUT = "layout"


class Layout(eqx.Module):
    """Where the windows of a solve were: their ends `ts`, increasing, of which the first `size` count, and the `segments` in
    each, if there were any."""

    ts: Float[Array, "*batch W1"]
    size: Int[ArrayLike, "*batch"]
    segments: Segments | None


def refine(sol: dfx.Solution) -> dfx.Solution:
    """Turns the dense output of windows into a `diffrax.DenseInterpolation` over all fine steps.

    A sequential solve of the same steps returns the same. Values and derivatives do not change. Evaluation at many times is
    faster: each time costs one search and the local interpolant of one fine step. Without `refine`, Diffrax first extracts
    the dense output of a whole window for each time.

    It is the fastest way to many saved states, which Diffrax's loop over `SaveAt(ts=...)` saves one by one:

    ```python
    sol = diffrax.diffeqsolve(..., saveat=diffrax.SaveAt(dense=True), max_steps=windows)
    ys = jax.vmap(pdx.refine(sol).evaluate)(ts)
    ```

    Set these options of the solve with it:

    - `max_steps`: the number of windows. `SaveAt(dense=True)` allocates memory for `max_steps` windows, and Diffrax's
        default is 4096.
    - `adjoint=diffrax.DirectAdjoint()` with that `max_steps`. Unlike the default adjoint, its backward pass does not solve
        the windows again and takes half the time. It stores all that the derivative of each window needs.
    - `SaveAt(dense=True, solver_state=True)` if `statistics(sol)` is wanted too.

    **Arguments:**

    - `sol`: the solution of `diffeqsolve(..., solver=ParallelSolver(...), saveat=SaveAt(dense=True))`. For a batch, use
        `jax.vmap(refine)(sol)`.

    **Returns:** `sol` with another `interpolation`, differentiable as `sol` is. It is NaN on fine steps that are not finite
    and at times outside the solve. `sol.stats` tells where the windows were, for `diagnostics.plot`.

    **Cost:** a copy of the dense output.

    **Raises:** `TypeError` if `sol` is not a `diffrax.Solution`; `ValueError` if it has no dense output, is of another
    solver, or is a batch.
    """
    call = "`refine(sol)`"
    if not isinstance(sol, dfx.Solution):
        raise TypeError(f"{call}: expected the solution of `diffrax.diffeqsolve`, got {type(sol).__name__}.")
    windows = sol.interpolation
    if not isinstance(windows, dfx.DenseInterpolation):
        raise ValueError(f"{call}: expected a solution of `diffeqsolve(..., saveat=SaveAt(dense=True))`.")
    interpolation_cls = windows.interpolation_cls
    if not isinstance(interpolation_cls, ft.partial) or interpolation_cls.func is not WindowInterpolation:
        raise ValueError(
            f"{call}: expected a solution of `diffeqsolve(..., solver=ParallelSolver(...))`, got the dense output of "
            f"`{interpolation_cls!r}`, which has one step an interval already."
        )
    if windows.ts.ndim != 1:
        raise ValueError(
            f"{call}: got a batch of solutions, of shape {windows.ts.shape[:-1]}. Use `jax.vmap(refine)(sol)`."
        )
    layout = Layout(windows.ts, windows.ts_size, FineSteps.of_dense_info(windows.infos).segments)
    fine = _fine(windows, interpolation_cls.args[0])
    return replace(sol, interpolation=fine, stats=sol.stats | {LAYOUT: layout})


def _fine(windows: dfx.DenseInterpolation, interpolation_cls) -> dfx.DenseInterpolation:
    """The same dense output with one interval per fine step."""
    steps = FineSteps.of_dense_info(windows.infos)
    # All windows have the same number of steps. Unused windows are infinite, like the padding of Diffrax's own times.
    ts = jnp.append(windows.ts[:1], steps.ts[:, 1:])
    finite = steps.finite.reshape(-1)

    def flatten(x):
        x = x.reshape(finite.shape[0], *x.shape[2:])
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return nan_unless(finite.reshape(-1, *(1,) * (x.ndim - 1)), x) if inexact else x

    # Steps of length zero, at the end of the last window, are not used.
    end = windows.ts[windows.ts_size - 1]
    size = jnp.where(windows.ts_size == 1, 1, jnp.searchsorted(ts, end, side="left") + 1)
    return dfx.DenseInterpolation(
        ts=ts,
        ts_size=size,
        infos=jtu.tree_map(flatten, steps.infos),
        interpolation_cls=interpolation_cls,
        direction=windows.direction,
        t0_if_trivial=windows.t0_if_trivial,
        y0_if_trivial=windows.y0_if_trivial,
    )
