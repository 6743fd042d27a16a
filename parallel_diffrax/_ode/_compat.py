"""What Diffrax and Equinox do not offer under a public name. No other file of this room except `_loop_state.py` uses such
names.

Each name states why it is needed. If a release removes one, importing this file fails, or the tests of its users do.
"""

import inspect
import sys
from typing import Any, NamedTuple

import diffrax as dfx
import equinox.internal as eqxi
import optimistix as optx
from jaxtyping import Array

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
    """What a `diffrax.diffeqsolve` that is being traced was asked for: the step-size controller, whether dense output is
    saved, the times of `SaveAt(ts=...)`, the event with the other arguments of its conditions, and whether it is sought at
    the ends of windows only."""

    controller: dfx.AbstractStepSizeController
    dense: bool
    requested: list[Array]
    event: dfx.Event | None
    event_arguments: tuple[Any, dict[str, Any]]
    events_at_ends: bool

    @property
    def keeps_dense_output(self) -> bool:
        """Whether Diffrax keeps the dense output of a window."""
        return self.dense or self.event is not None


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
            if getattr(event, "never_happens", False):
                event = None
            located = getattr(event, "located", False) or getattr(found.get("adjoint"), "locates_events", False)
            names = ("terms", "solver", "t0", "t1", "dt0", "saveat", "stepsize_controller", "max_steps")
            arguments = (None, {}) if event is None else (found["args"], {name: found[name] for name in names})
            return Solve(
                controller=controller,
                dense=bool(saveat.dense),
                requested=[sub.ts for sub in requests(saveat) if sub.ts is not None],
                event=getattr(event, "original", event),
                event_arguments=arguments,
                events_at_ends=event is not None and not located,
            )
        frame = frame.f_back
    return None
