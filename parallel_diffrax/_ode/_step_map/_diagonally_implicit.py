"""Diagonally implicit Runge-Kutta methods: all stages of all steps at once."""

import dataclasses
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ..._kernels import holds_tracers
from ..._recurrence import Ravel
from ._base import AbstractEmbeddedSolver, StepOutput
from ._simplified_newton import simplified_newton_step
from ._stage_equations import scheme_of, StageEquations, weighted_sum


class Field(eqx.Module):
    """`h f` of a term at the time `t0 + c h`, for raveled states."""

    term: dfx.AbstractTerm
    args: PyTree
    ravel: Ravel = eqx.field(static=True)

    @staticmethod
    def make(term, args, ravel, examples):
        """The field without tracers in closures, so that it can be differentiated in everything that it depends on."""
        field = Field(term, args, ravel)
        converted: Any = eqx.filter_closure_convert(field, *examples)
        # A field without tracers in closures stays unconverted: each conversion makes a new jaxpr, and every function that
        # receives it would be traced again.
        return converted if holds_tracers(converted.consts, besides=(term, args)) else field

    def __call__(self, c, t0, t1, y):
        # As in Diffrax: a stage at the end of the step has no rounding in its time.
        t = jnp.where(c == 1, t1, t0 + c * (t1 - t0))
        y = self.ravel.unravel(y)
        return self.ravel.ravel(self.term.vf_prod(t, y, self.args, self.term.contr(t0, t1)))


class DiagonallyImplicitStep(AbstractEmbeddedSolver):
    """A step of a diagonally implicit (DIRK, SDIRK, ESDIRK) or implicit-explicit Runge-Kutta method.

    The stages `z_i = Y_i - y0` of every step are unknowns beside the states: `z_i = p_i + a_ii h f(t_i, y0 + z_i)`, where
    `p_i = sum_{j<i} a_ij k_j` and `k_j = (z_j - p_j) / a_jj`. Linearised about an iterate, with `J_i = h f_y` at stage `i`,

        (I - a_ii J_i) dY_i = d + dp_i + (p_i + a_ii h f - z_i),    dk_i = (dY_i - d - dp_i) / a_ii.

    These equations are solved stage by stage for `D + 1` right-hand sides at once: the residuals of the stages, and the
    derivative with respect to a change `d` of the state at the start of the step. One linear recurrence in the states
    remains. The last stage of a stiffly accurate method gives its matrix: no large numbers cancel, however stiff the
    problem. (With `k_i` as unknowns, `Y_i` is a sum of numbers as large as the step size times the stiffness. These follow a
    change of `y0` to first order less well than the states do: Robertson's reaction diverges after two iterations.)

    A step by itself (coarse guesses, steps in sequence) iterates in the same way. The solver's own root finder is not used.

    An iteration takes one evaluation of the field and its Jacobian, and one elimination, per stage and step, and memory
    `N S D^2` for `S` implicit stages.

    ??? cite "Reference"

        Kennedy and Carpenter, "Diagonally implicit Runge-Kutta methods for ordinary differential equations. A review",
        NASA/TM-2016-219173 (2016).
    """

    solver: dfx.AbstractSolver
    terms: PyTree[dfx.AbstractTerm]
    args: PyTree
    equations: StageEquations
    ravel: Ravel = eqx.field(static=True)

    @staticmethod
    def supports(solver: dfx.AbstractSolver) -> bool:
        """Whether a diagonally implicit tableau, alone or beside an explicit one, defines the solver."""
        cls = type(solver)
        if cls is dfx.ImplicitEuler:
            return True
        if not issubclass(cls, dfx.AbstractRungeKutta) or cls.step is not dfx.AbstractRungeKutta.step:
            return False
        tableau = cls.tableau
        if isinstance(tableau, dfx.MultiButcherTableau):
            return [t.implicit for t in tableau.tableaus] == [False, True]
        return tableau.implicit

    @classmethod
    def make(cls, solver: dfx.AbstractSolver, terms, y0, args, time_dtype) -> "DiagonallyImplicitStep":
        """The step map of `solver` for states like `y0`."""
        scheme, ravel, time = scheme_of(type(solver)), Ravel(y0), jnp.zeros((), time_dtype)
        examples = (time, time, time, jnp.zeros(ravel.size, ravel.dtype))
        *explicit, implicit = (
            Field.make(term, args, ravel, examples) for term in (terms.terms if scheme.multiple else (terms,))
        )
        equations = StageEquations(implicit, explicit[0] if explicit else None, ravel.eps, scheme)
        return cls(solver, terms, args, equations, ravel)

    @property
    def has_increment(self):
        return True

    @property
    def stages(self):
        return self.equations

    def increment(self, t0, t1, y0):
        y = self.ravel.ravel(y0)
        return self.ravel.unravel(self.equations.solve(y, None, (t0, t1)))

    @property
    def embedded_solver(self):
        solver = dfx.KenCarp3() if self.equations.scheme.multiple else dfx.Kvaerno3()
        equations = dataclasses.replace(self.equations, scheme=scheme_of(type(solver)))
        return DiagonallyImplicitStep(solver, self.terms, self.args, equations, self.ravel)

    def slope(self, t, y):
        parts = self.terms.terms if self.equations.scheme.multiple else (self.terms,)
        slopes = [term.vf(t, y, self.args) for term in parts]
        return jtu.tree_map(lambda *x: sum(x[1:], x[0]), *slopes)

    def trial(self, t0, t1, y0, slope):
        slope = None if slope is None else self.ravel.ravel(slope)
        results = simplified_newton_step(self.equations, self.ravel.ravel(y0), slope, (t0, t1))
        return tuple(map(self.ravel.unravel, results))

    @property
    def joins_steps(self):
        # The methods whose last stage is the first one of the next step. Diffrax hands it on.
        scheme = self.equations.scheme
        whole = isinstance(self.solver, dfx.AbstractRungeKutta) and not scheme.multiple
        return whole and scheme.a[0, 0] == 0 and bool(np.allclose(scheme.a[-1], scheme.b, rtol=0, atol=1e-12))

    def joined(self, dense_info, before, ratio):
        """The first slope is the last one of the step before. That belongs to the slow solution. The field at the state
        itself need not: a stiff problem multiplies the error of the state, which the root finder's tolerance allows, by a
        large number, and an interpolant with that slope is far off between the ends of the step."""
        join = lambda k, last: k.at[0].set(last[-1] * jnp.asarray(ratio, k.dtype))
        return dense_info | {"k": jtu.tree_map(join, dense_info["k"], before["k"])}

    def __call__(self, t0, t1, y0, y1=None):
        """See `AbstractStepMap`. If `y1` is known, the iteration on the stages starts on the line to it."""
        equations, scheme, ravel, x = self.equations, self.equations.scheme, self.ravel, (t0, t1)
        y = ravel.ravel(y0)
        w = equations.solve_stages(y, x, None if y1 is None else ravel.ravel(y1))
        k, l = equations.values(y, w, x)
        increment = equations.increment(w, k, l)
        end = ravel.unravel(y + increment)
        error = weighted_sum(jnp.zeros_like(y), (scheme.b_error, k), (scheme.f_error, l))
        failure: Any = dfx.RESULTS.nonlinear_divergence
        result = dfx.RESULTS.where(jnp.all(jnp.isfinite(increment)), dfx.RESULTS.successful, failure)
        dense_info = {"y0": y0, "y1": end}
        if isinstance(self.solver, dfx.AbstractRungeKutta):
            stack = lambda ks: jtu.tree_map(lambda *k: jnp.stack(k), *map(ravel.unravel, ks))
            dense_info["k"] = (stack(l), stack(k)) if scheme.multiple else stack(k)
        return StepOutput(end, ravel.unravel(error), dense_info, result)
