"""What Diffrax and Equinox do not offer under a public name. No other file of this room except `_loop_state.py` uses such
names.

Each name states why it is needed. If a release removes one, importing this file fails, or the tests of its users do.
"""

import inspect
import sys
from typing import NamedTuple

import diffrax as dfx
import equinox.internal as eqxi
import optimistix as optx

from ._saving import requests


# `diffrax.with_stepsize_controller_tols(cls)()` marks a tolerance as "taken from the step-size controller" by an object that
# Diffrax does not export. Any such root finder holds it.
_UNSET = dfx.with_stepsize_controller_tols(optx.Chord)().rtol


def unset_tolerances(root_finder) -> list[str]:
    """The names of the tolerances of a root finder that are to be taken from the step-size controller."""
    return [name for name in ("rtol", "atol", "norm") if getattr(root_finder, name, None) is _UNSET]


def not_reversible(tree, message: str):
    """`tree`, with an error `message` if it is differentiated in reverse mode. JAX's own error names an internal loop."""
    return eqxi.nondifferentiable_backward(tree, msg=message, symbolic=True)


class Solve(NamedTuple):
    """What a `diffrax.diffeqsolve` that is being traced was asked for: the step-size controller, whether it keeps dense
    output (`SaveAt(dense=True)`, or an event), whether it evaluates dense output at all (also for `SaveAt(ts=...)`), and
    whether it looks for events at the ends of windows only."""

    controller: dfx.AbstractStepSizeController
    keeps_dense_output: bool
    stores_outputs: bool
    events_at_ends: bool


_INTEGRATE = inspect.unwrap(dfx.diffeqsolve).__code__.co_filename


def current_solve() -> Solve | None:
    """The innermost `diffrax.diffeqsolve` that is being traced; `None` outside of one.

    Diffrax tells a solver nothing about the controller that lays its steps, except to an implicit solver the tolerances
    that its root finder lacks, and for a solver without them it refuses constant steps. So this reads the local variables
    of the function that traces. If a release renames them, it returns `None`: an adaptive controller then lays windows with
    a fixed number of steps, and `tests/test_controlled_steps.py` fails.
    """
    frame = sys._getframe(1)
    while frame is not None:
        # `diffeqsolve` initialises the solver, and `loop` makes its steps.
        if frame.f_code.co_filename == _INTEGRATE and frame.f_code.co_name in ("loop", "diffeqsolve"):
            found = frame.f_locals
            controller, saveat = found.get("stepsize_controller"), found.get("saveat")
            if not isinstance(controller, dfx.AbstractStepSizeController) or not isinstance(saveat, dfx.SaveAt):
                return None
            # `ParallelAdjoint` wraps it.
            controller = getattr(controller, "unwrapped", controller)
            event = found.get("event")
            keeps = bool(saveat.dense) or not (event is None or getattr(event, "never_happens", False))
            located = getattr(event, "located", False) or getattr(found.get("adjoint"), "locates_events", False)
            stores = keeps or any(sub.ts is not None for sub in requests(saveat))
            return Solve(controller, keeps, stores, event is not None and not located)
        frame = frame.f_back
    return None
