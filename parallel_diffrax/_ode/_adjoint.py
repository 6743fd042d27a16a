"""`ParallelAdjoint`, an optional accelerator for outputs, events and derivatives."""

import dataclasses
from typing import Any

import diffrax as dfx
import jax.tree_util as jtu

from ._solver import ParallelSolver
from ._window_loop import repeat_windows


class ParallelAdjoint(dfx.AbstractAdjoint):
    """Saves outputs, locates events and differentiates faster than Diffrax's adjoints, on the windows of a `ParallelSolver`.

    Use it if a solve has many outputs, events, or derivatives. The windows and the numbers are the same as without it.

    ```python
    sol = diffrax.diffeqsolve(
        terms, pdx.ParallelSolver(diffrax.Tsit5(), num_steps=4096), t0, t1, dt0=t1 - t0, y0=y0,
        saveat=diffrax.SaveAt(ts=ts), max_steps=1, adjoint=pdx.ParallelAdjoint(),
    )
    ```

    - *Outputs*: all `SaveAt(ts=...)` outputs of a window are computed at once. Diffrax's own loop saves them one by one.
        Every form of `SaveAt` works. `SaveAt(steps=True)` saves the ends of windows.
    - *Events* are located on fine steps. The first crossing in a window is found, by Diffrax's rules for steps, and outputs
        end there. If a condition function becomes NaN before the first event, the result is `nonfinite`. A window whose
        solution exists only up to the event is not a failure. If the root finder does not find the time of an event, the
        solve fails, and its derivatives are NaN.
    - *Derivatives* in forward and reverse mode, of any order: one linear scan per window and no second solve. Diffrax's
        default adjoint solves each window twice and has no forward mode.

    Progress meters, step-size controllers, `max_steps`, jumps and results are Diffrax's own.

    **Cost:** `M` evaluations of the interpolant per window, for `M` requested times in all; with an event, `N` evaluations
    of its conditions per window. Set `max_steps` to the number of windows, or a little more. With `max_steps=1` the backward
    pass stores all that it needs; else it stores `N D` numbers for each of `max_steps` windows.

    **Raises:** `ValueError` for a solver that is not a `ParallelSolver` (use Diffrax's adjoints) and for
    `UnsafeBrownianPath`; `RuntimeError` in reverse mode without `max_steps`, and for a version of Diffrax with another loop.
    """

    # See `current_solve`.
    locates_events = True

    def loop(
        self, *, terms, solver, throw, passed_solver_state, passed_controller_state, **kwargs: Any
    ) -> tuple[Any, dict]:
        """Called by `diffrax.diffeqsolve`."""
        del throw, passed_solver_state, passed_controller_state
        if not issubclass(type(solver), ParallelSolver):
            # (Not `isinstance`: a wrapping solver claims to be an instance of the solver inside.)
            name = type(solver).__name__
            raise ValueError(
                f"`diffeqsolve(..., solver={name}(...), adjoint=ParallelAdjoint())`: this solver has no windows whose "
                f"outputs could be computed at once. Use `solver=ParallelSolver({name}(...), num_steps=...)`, with "
                "`ParallelSolver` as the outermost solver, or one of Diffrax's own adjoints."
            )
        leaves = jtu.tree_leaves(terms, is_leaf=lambda x: isinstance(x, dfx.UnsafeBrownianPath))
        if any(isinstance(leaf, dfx.UnsafeBrownianPath) for leaf in leaves):
            raise ValueError(
                "`diffeqsolve(..., adjoint=ParallelAdjoint())` does not support `UnsafeBrownianPath`, whose values cannot "
                "be evaluated again. Use `VirtualBrownianTree`."
            )
        # Imported here: if a release of Diffrax moves the private names in that file, everything else still works.
        from ._loop_state import run_loop

        return run_loop(repeat_windows, terms=terms, solver=solver, **kwargs)


class CountingAdjoint(ParallelAdjoint):
    """`ParallelAdjoint` with Diffrax's statistics for fine steps instead of windows, and those of windows beside them. A
    solve that made more than `max_steps` fine steps has failed."""

    max_steps: int | None = None

    def loop(self, *, solver, init_state, **kwargs: Any) -> tuple[Any, dict]:
        from ._loop_state import step_counts

        final, stats = super().loop(solver=solver, init_state=init_state, **kwargs)
        counts = step_counts(init_state, final, solver.capacity)
        if self.max_steps is not None:
            exceeded = (counts["num_steps"] > self.max_steps) & dfx.is_okay(final.result)
            result = dfx.RESULTS.where(exceeded, dfx.RESULTS.max_steps_reached, final.result)
            final = dataclasses.replace(final, result=result)
        return final, stats | counts
