"""The optional accelerator: outputs all at once, events on fine steps, derivatives without a second solve."""

from typing import Any

import diffrax as dfx
import jax.tree_util as jtu

from ._solver import ParallelSolver
from ._window_loop import repeat_windows


class ParallelAdjoint(dfx.AbstractAdjoint):
    """Makes the most of the windows of a `ParallelSolver`; the same windows and the same numbers as without it.

    ```python
    sol = diffrax.diffeqsolve(
        terms, pdx.ParallelSolver(diffrax.Tsit5(), num_steps=4096), t0, t1, dt0=t1 - t0, y0=y0,
        saveat=diffrax.SaveAt(ts=ts), max_steps=1, adjoint=pdx.ParallelAdjoint(),
    )
    ```

    - *Outputs*: all `SaveAt(ts=...)` outputs of a window are computed at once; Diffrax's own loop saves them one after the
        other. Every form of `SaveAt` works. `SaveAt(steps=True)` saves the ends of windows.
    - *Events* are located on fine steps: of all crossings in a window the first is found, by the rules that Diffrax has for
        steps, and outputs end there. A condition function that becomes NaN before that makes the result `nonfinite`. A
        window whose solution exists only up to the event is no failure.
    - *Derivatives*, forwards and backwards, of any order: one linear scan for each window, and no second solve.
        Diffrax's default adjoint solves each window twice, and has no forward mode.

    Progress meters, step-size controllers, `max_steps`, jumps and results are Diffrax's own.

    **Arguments:** none.

    **Cost:** `M` evaluations of the interpolant in each window, for `M` requested times in all; with an event, `N`
    evaluations of its conditions. `max_steps` should be the number of windows, or not much more: the backward pass keeps
    `N D` numbers for each of them, and everything that it needs if it is one.

    **Raises:** `ValueError` for a solver that is not a `ParallelSolver`, for which Diffrax's own adjoints are right, and for
    `UnsafeBrownianPath`; in reverse mode, a runtime error without `max_steps`.
    """

    def loop(
        self, *, terms, solver, throw, passed_solver_state, passed_controller_state, **kwargs: Any
    ) -> tuple[Any, dict]:
        """Called by `diffrax.diffeqsolve`."""
        del throw, passed_solver_state, passed_controller_state
        if not issubclass(type(solver), ParallelSolver):
            # A wrapped solver claims to be an instance of what it wraps.
            name = type(solver).__name__
            raise ValueError(
                f"`diffeqsolve(..., solver={name}(...), adjoint=ParallelAdjoint())`: there are no windows of steps whose "
                f"outputs could be computed at once. Use `solver=ParallelSolver({name}(...), num_steps=...)`, with "
                "whatever wraps a solver inside, or one of Diffrax's own adjoints."
            )
        leaves = jtu.tree_leaves(terms, is_leaf=lambda x: isinstance(x, dfx.UnsafeBrownianPath))
        if any(isinstance(leaf, dfx.UnsafeBrownianPath) for leaf in leaves):
            raise ValueError(
                "`diffeqsolve(..., adjoint=ParallelAdjoint())` does not support `UnsafeBrownianPath`, whose values cannot "
                "be had again. Use `VirtualBrownianTree`."
            )
        # Here and not above: where a release of Diffrax has moved what that imports, all else still works.
        from ._loop_state import run_loop

        return run_loop(repeat_windows, terms=terms, solver=solver, **kwargs)
