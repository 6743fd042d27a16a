"""Several steps of a method as one: the segments of multiple shooting."""

from typing import cast

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ..._scan import check_integer
from .._interpolation import window_interpolation
from ._base import AbstractStepMap, StepOutput
from ._explicit_runge_kutta import ExplicitRungeKuttaStep


class MultipleShooting(dfx.AbstractWrappedSolver):
    """Makes several equal steps of a base solver in each step: `MultipleShooting(Tsit5(), 8)`.

        ParallelSolver(MultipleShooting(Tsit5(), L), num_steps=M)

    solves `M L` steps of `Tsit5` with only `M` states as unknowns, the ends of segments of `L` steps: the equations are
    `y[i] = F^L(y[i-1])`, those of multiple shooting. The steps of a segment are made in sequence, all segments at once. The
    solution is that of the base solver on the grid of `M L` steps. Less is kept: `M D^2` numbers of Jacobians instead of
    `M L D^2`, in every scan too. It pays for very many steps, where memory or its bandwidth is the limit; a few
    thousand steps are better solved without.

    It is an ordinary Diffrax solver too: dense output is the base solver's on each of the `L` steps, the error estimate the
    sum of the magnitudes of theirs.

    **Arguments:**

    - `solver`: the base solver: an explicit Runge-Kutta method of Diffrax, or one with your own tableau.
    - `num_substeps`: `L`, at least 1.

    Cost of a segment: `L` steps of depth; with its Jacobian, `L (D + 1)` evaluations of a step, whose number does not depend
    on `L` for a given grid. Derivatives keep the states of all `M L` steps, and compute the rest again.

    **Raises:** `ValueError` for other kinds of base solvers, whose stages or states are unknowns already, and for a number
    of substeps that is not a positive integer.

    ??? cite "Reference"

        Bock, Plitt, "A multiple shooting algorithm for direct solution of optimal control problems", IFAC Proceedings 17
        (1984).
    """

    solver: dfx.AbstractSolver
    num_substeps: int = eqx.field(static=True)

    def __check_init__(self):
        check_integer(
            "MultipleShooting", "num_substeps", self.num_substeps, "the number of steps in a shooting interval"
        )
        if not ExplicitRungeKuttaStep.supports(self.solver):
            raise ValueError(
                f"`MultipleShooting({self.solver!r}, ...)`: segments can be made of explicit Runge-Kutta methods, such as "
                "`diffrax.Tsit5()`. Use this solver by itself in `ParallelSolver`."
            )

    @property
    def term_structure(self):
        return self.solver.term_structure

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

    def init(self, terms, t0, t1, y0, args):
        del terms, t0, t1, y0, args

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        out = ShootingStep(self, terms, args)(t0, t1, y0)
        return out.y1, out.y_error, out.dense_info, None, out.result


class ShootingStep(AbstractStepMap):
    """`y1 = Phi(t[L-1], t1, ... Phi(t0, t[1], y0))`, with equidistant times between `t0` and `t1`.

    **Arguments:** a `MultipleShooting` solver, `terms` and `args`.
    """

    solver: MultipleShooting
    terms: PyTree[dfx.AbstractTerm]
    args: PyTree

    @property
    def explicit(self):
        return True

    @property
    def has_increment(self):
        return True

    @property
    def embedded_solver(self):
        return self.single.embedded_solver

    @property
    def single(self):
        return ExplicitRungeKuttaStep(cast(dfx.AbstractERK, self.solver.solver), self.terms, self.args)

    @property
    def num_substeps(self):
        return self.solver.num_substeps

    def increment(self, t0, t1, y0):
        single = self.single

        def substep(total, times):
            y = jtu.tree_map(lambda a, b: a + b, y0, total)
            more = single.increment(times[0], times[1], y)
            return jtu.tree_map(lambda a, b: (a + b).astype(a.dtype), total, more), None

        return self._scan(substep, jtu.tree_map(jnp.zeros_like, y0), t0, t1)[0]

    def __call__(self, t0, t1, y0, y1=None):
        del y1
        single = self.single

        def substep(y, times):
            out = single(times[0], times[1], y)
            return out.y1, (out.y_error, out.dense_info, times[1])

        y1, (errors, infos, ends) = self._scan(substep, y0, t0, t1)
        y_error = jtu.tree_map(lambda e: jnp.sum(jnp.abs(e), axis=0), errors)
        all_well = jnp.ones(self.num_substeps, bool)
        ts = jnp.concatenate([jnp.asarray(t0, ends.dtype)[None], ends])
        dense_info = {"ts": ts, "infos": infos, "finite": all_well, "solved": all_well}
        return StepOutput(y1, y_error, dense_info, dfx.RESULTS.successful)

    def _scan(self, substep, init, t0, t1):
        """The substeps in sequence; their states are all that a derivative keeps."""
        count = self.num_substeps
        shares = jnp.asarray(np.arange(count + 1) / count, jnp.result_type(t0, t1))

        def body(carry, share):
            begin, end = (jnp.where(x == 1, t1, t0 + (t1 - t0) * x) for x in share)
            return substep(carry, (begin, end))

        return lax.scan(jax.checkpoint(body, prevent_cse=False), init, (shares[:-1], shares[1:]))
