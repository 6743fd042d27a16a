"""`diffrax.PIDController` for windows: the user's bounds on a step bound each fine step of a window."""

from dataclasses import fields, replace

import diffrax as dfx
import equinox as eqx


class WindowPID(dfx.PIDController):
    """A `PIDController` of windows of `num_steps` steps. Its initial, smallest and largest steps are those of a step."""

    num_steps: int = eqx.field(static=True, default=1)

    @staticmethod
    def of(controller, num_steps: int):
        """The controller of windows for a `PIDController` of steps, which may be inside a `ClipStepSizeController`."""
        if isinstance(controller, dfx.ClipStepSizeController):
            inner = WindowPID.of(controller.controller, num_steps)
            return eqx.tree_at(lambda clip: clip.controller, controller, inner)
        values = {field.name: getattr(controller, field.name) for field in fields(controller)}
        return WindowPID(**values, num_steps=num_steps)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        end, state = super().init(terms, t0, t1, y0, dt0, args, func, error_order)
        return t0 + (end - t0) * self.num_steps, state

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state):
        bounds = {name: getattr(self, name) for name in ("dtmin", "dtmax")}
        scaled = replace(self, **{k: bound * self.num_steps for k, bound in bounds.items() if bound is not None})
        step = t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
        return super(WindowPID, scaled).adapt_step_size(*step)
