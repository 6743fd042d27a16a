"""Dense output of windows as Diffrax's own over all fine steps."""

import functools as ft

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from ._interpolation import WindowInterpolation


def refine(sol: dfx.Solution) -> dfx.Solution:
    """The dense output of a solve in windows, as a `diffrax.DenseInterpolation` over all its fine steps: what a sequential
    solve of the same steps returns. It has the same values and derivatives, and is faster to evaluate at many times: one
    search and the local interpolant of one fine step a time, where before the whole of a window's dense output is taken
    apart first.

    Many saved states are fastest so, at once rather than in Diffrax's loop over `SaveAt(ts=...)`:

    ```python
    sol = diffrax.diffeqsolve(..., saveat=diffrax.SaveAt(dense=True), max_steps=windows)
    ys = jax.vmap(pdx.refine(sol).evaluate)(ts)
    ```

    Two more recipes go with it:

    - `max_steps`: the number of windows. `SaveAt(dense=True)` allocates memory for so many, and Diffrax's default is 4096.
    - `adjoint=diffrax.DirectAdjoint()` with such a `max_steps`: its backward pass does not solve the windows again, as that
        of the default adjoint does, and takes half the time. It stores all that a window needs for its derivative.
    - `SaveAt(solver_state=True)` beside it: `sol.solver_state` is a `WindowStatistics`, of what the solve did.

    **Arguments:**

    - `sol`: of `diffeqsolve(..., solver=ParallelSolver(...), saveat=SaveAt(dense=True))`. Of a batch of solves use
        `jax.vmap(refine)(sol)`.

    **Returns:** `sol` with another `interpolation`. Differentiable as `sol` is. Fine steps without a finite outcome, and
    times outside of the solve, give NaN.

    **Raises:** `ValueError` for a solution without dense output, of another solver, or of a batch.

    Cost: a copy of the dense output.
    """
    call = "`refine(sol)`"
    if not isinstance(sol, dfx.Solution):
        raise TypeError(f"{call}: expected the solution of a `diffrax.diffeqsolve`, got {type(sol).__name__}.")
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
    return eqx.tree_at(lambda sol: sol.interpolation, sol, _fine(windows, interpolation_cls.args[0]))


def _fine(windows: dfx.DenseInterpolation, interpolation_cls) -> dfx.DenseInterpolation:
    """One interval a fine step."""
    window_ts, finite = windows.infos["ts"], windows.infos["finite"]
    # All windows have as many steps. What follows those that were made is infinite, as the padding of Diffrax's own is.
    ts = jnp.append(windows.ts[:1], window_ts[:, 1:])
    finite = finite.reshape(-1)

    def flatten(x):
        x = x.reshape(-1, *x.shape[2:])
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return jnp.where(finite.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.nan)

    # Of steps of length zero, at the end of the last window, none is used.
    end = windows.ts[windows.ts_size - 1]
    size = jnp.where(windows.ts_size == 1, 1, jnp.searchsorted(ts, end, side="left") + 1)
    return dfx.DenseInterpolation(
        ts=ts,
        ts_size=size,
        infos=jtu.tree_map(flatten, windows.infos["infos"]),
        interpolation_cls=interpolation_cls,
        direction=windows.direction,
        t0_if_trivial=windows.t0_if_trivial,
        y0_if_trivial=windows.y0_if_trivial,
    )
