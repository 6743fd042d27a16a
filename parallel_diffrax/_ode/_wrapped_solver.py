"""A solver whose steps consist of fine steps of a base solver."""

import diffrax as dfx

from ._interpolation import window_interpolation


class AbstractFineStepSolver(dfx.AbstractWrappedSolver):
    """A solver that makes several fine steps of its base solver, `solver`, in each step.

    Terms, orders and the vector field are those of the base solver. Dense output is a `WindowInterpolation`.

    (`diffrax.AbstractWrappedSolver` forwards `isinstance` to the base solver, but no attributes.)
    """

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def interpolation_cls(self):  # pyright: ignore
        return window_interpolation(self.solver.interpolation_cls)

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)
