"""Several steps of a method as one: the shooting intervals of multiple shooting."""

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
from .._interpolation import FineSteps
from .._wrapped_solver import AbstractFineStepSolver
from ._base import AbstractStepMap, StepOutput
from ._explicit_runge_kutta import ExplicitRungeKuttaStep


class MultipleShooting(AbstractFineStepSolver):
    """A solver that makes several equal steps of a base solver in each of its steps.

    Use it for very many steps, where memory or its bandwidth is the limit. It does not pay for a few thousand steps.

        ParallelSolver(MultipleShooting(Tsit5(), L), num_steps=M)

    solves `M L` steps of `Tsit5` with only `M` unknown states, the ends of shooting intervals of `L` steps. The equations
    are those of multiple shooting, `y[i] = F^L(y[i-1])`. The steps of a shooting interval are made in sequence, all
    shooting intervals in parallel. The solution is that of the base solver on the grid of `M L` steps. Jacobians take
    `M D^2` numbers instead of `M L D^2`, in every scan too.

    By itself it is an ordinary Diffrax solver. Its dense output is that of the base solver on each of the `L` steps, its
    error estimate the sum of the magnitudes of theirs.

    **Arguments:**

    - `solver`: the base solver: an explicit Runge-Kutta method of Diffrax, or one with your own tableau.
    - `num_substeps`: `L`, the number of steps in a shooting interval, at least 1.

    **Cost of a shooting interval:** depth `L`; with its Jacobian, `L (D + 1)` evaluations of a step, so the total for a
    given grid does not depend on `L`. Derivatives keep the states of all `M L` steps and compute the rest again.

    **Raises:** `ValueError` for other kinds of base solvers, whose stages or solver states are unknowns already;
    `TypeError` or `ValueError` if `num_substeps` is not a positive integer.

    ??? cite "Reference"

        Bock, Plitt, "A multiple shooting algorithm for direct solution of optimal control problems", IFAC Proceedings 17
        (1984).
    """

    solver: dfx.AbstractSolver
    num_substeps: int = eqx.field(static=True)

    def __check_init__(self):
        meaning = "the number of steps in a shooting interval"
        check_integer("MultipleShooting", "num_substeps", self.num_substeps, meaning)
        if not ExplicitRungeKuttaStep.supports(self.solver):
            raise ValueError(
                f"`MultipleShooting({self.solver!r}, ...)`: expected an explicit Runge-Kutta method, for example "
                "`diffrax.Tsit5()`. Use this solver in `ParallelSolver` without `MultipleShooting`."
            )

    def init(self, terms, t0, t1, y0, args):
        del terms, t0, t1, y0, args

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        out = self.step_map(terms, y0, args)(t0, t1, y0)
        return out.y1, out.y_error, out.dense_info, None, out.result

    def step_map(self, terms, y0, args) -> "ShootingStep":
        """One shooting interval as a step map. `ParallelSolver` asks for it."""
        del y0
        return ShootingStep(self, terms, args)


class ShootingStep(AbstractStepMap):
    """One shooting interval: `y1 = Phi(t[L-1], t1, ... Phi(t0, t[1], y0))`, with equidistant times from `t0` to `t1`."""

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
        all_steps = jnp.ones(self.num_substeps, bool)
        ts = jnp.concatenate([jnp.asarray(t0, ends.dtype)[None], ends])
        steps = FineSteps(ts, infos, finite=all_steps, solved=all_steps, end=ts[-1])
        return StepOutput(y1, y_error, steps.as_dense_info(), dfx.RESULTS.successful)

    def _scan(self, substep, init, t0, t1):
        """The substeps in sequence. A derivative keeps only their states."""
        count = self.num_substeps
        shares = jnp.asarray(np.arange(count + 1) / count, jnp.result_type(t0, t1))

        def body(carry, share):
            begin, end = (jnp.where(x == 1, t1, t0 + (t1 - t0) * x) for x in share)
            return substep(carry, (begin, end))

        return lax.scan(jax.checkpoint(body, prevent_cse=False), init, (shares[:-1], shares[1:]))


class IntervalStep(AbstractStepMap):
    """Several steps of another step map, as predictors see them. The recurrence of a window makes the steps."""

    solver: dfx.AbstractSolver
    terms: PyTree[dfx.AbstractTerm]
    inner: AbstractStepMap
    length: int = eqx.field(static=True)

    @property
    def single(self):
        return self.inner

    @property
    def num_substeps(self):
        return self.length

    @property
    def has_increment(self):
        return self.inner.has_increment

    @property
    def embedded_solver(self):
        return self.inner.embedded_solver

    def __call__(self, t0, t1, y0, y1=None):
        raise NotImplementedError
