"""Diagonally implicit Runge-Kutta methods, whose stages are solved for together with the steps."""

import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..._recurrence import AbstractStages, LinearisedStep, Ravel
from ..._scan import eliminate
from ._base import AbstractScout, StepOutput


# The stages of a step by itself are iterated on at most so often.
_MAX_ITERATIONS = 20
# Coefficients of Diffrax's tableaus that ought to be equal differ by rounding.
_ROUNDING = 1e-13


class _Scheme:
    """The coefficients of a method with an implicit part, and an explicit one that may be absent.

    Stage `i` is `Y_i = y0 + sum_j a_ij k_j + sum_{j<i} e_ij l_j`, where `k_i = h f(t_i, Y_i)` of the implicit part,
    and `l_i` likewise of the explicit one; `y1 = y0 + sum_j b_j k_j + f_j l_j`. Tableaus of one implicit stage begin with an explicit
    one that enters the error estimate only.
    """

    def __init__(self, cls: type[dfx.AbstractSolver]):
        tableau: Any = getattr(cls, "tableau", None)
        if tableau is None:
            # Diffrax writes the implicit Euler method without one; its error estimate is the trapezoidal rule's.
            tableau = dfx.ButcherTableau(
                a_lower=(np.array([0.0]),),
                b_sol=np.array([0.0, 1.0]),
                b_error=np.array([-0.5, 0.5]),
                c=np.array([1.0]),
                a_diagonal=np.array([0.0, 1.0]),
                a_predictor=(np.array([1.0]),),
            )
        explicit, implicit = tableau.tableaus if isinstance(tableau, dfx.MultiButcherTableau) else (None, tableau)
        self.multiple = explicit is not None
        self.lower, self.diagonal = _square(implicit), np.asarray(implicit.a_diagonal)
        self.a = self.lower + np.diag(self.diagonal)
        self.b, self.b_error = implicit.b_sol, implicit.b_error
        self.c = np.concatenate([[0.0 if implicit.c1 is None else implicit.c1], implicit.c])
        if explicit is not None:
            self.e = _square(explicit)
            self.f, self.f_error = explicit.b_sol, explicit.b_error
            self.explicit_c = np.concatenate([[0.0], explicit.c])
        else:
            self.e, self.f, self.f_error = np.zeros_like(self.a), np.zeros_like(self.b), np.zeros_like(self.b)
            self.explicit_c = self.c
        self.num_stages = len(self.b)
        self.implicit_stages = [i for i in range(self.num_stages) if self.a[i, i] != 0]
        assert self.implicit_stages == list(range(self.num_stages))[-len(self.implicit_stages) :]


@ft.cache
def _scheme(cls: type[dfx.AbstractSolver]) -> _Scheme:
    return _Scheme(cls)


def _square(tableau: dfx.ButcherTableau) -> np.ndarray:
    size = len(tableau.b_sol)
    a = np.zeros((size, size))
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = row
    return a


def _sum(start, *weighted):
    """`start + sum of weights * arrays`, without those of weight zero."""
    for weights, arrays in weighted:
        for w, x in zip(weights, arrays):
            if abs(w) > _ROUNDING:
                start = start + float(w) * x
    return start


def _solve(matrix: Float[Array, " D D"], rhs: Float[Array, " D K"]) -> Float[Array, " D K"]:
    # Its derivative is another solve, rather than that of every operation of the elimination.
    return lax.custom_linear_solve(
        lambda x: matrix @ x,
        rhs,
        solve=lambda _, b: eliminate(matrix, b),
        transpose_solve=lambda _, b: eliminate(matrix.T, b),
    )


def _with_jacobian(fn: Callable, y: Float[Array, " D"]) -> tuple[Float[Array, " D"], Float[Array, " D D"]]:
    return jax.vmap(lambda e: jax.jvp(fn, (y,), (e,)), out_axes=(None, 1))(jnp.eye(y.shape[0], dtype=y.dtype))


class _Equations(AbstractStages):
    """The stages of one step as unknowns: raveled states, inputs `(t0, t1)`.

    `field(c, t0, t1, y)` is `h f` at the time `t0 + c h` of the implicit part, `explicit_field` of the explicit one; both
    have no arrays in closures, so that what they depend on can be differentiated.
    """

    field: Callable
    explicit_field: Callable | None
    eps: float = eqx.field(static=True)
    scheme: _Scheme = eqx.field(static=True)

    @staticmethod
    def evaluate(field, c, x, y):
        """`h f` at a stage."""
        t0, t1 = jnp.asarray(x[0]), jnp.asarray(x[1])
        return field(jnp.asarray(c, t0.dtype), t0, t1, y)

    def guess(self, y0, y1, x):
        """Stages on the straight line from `y0` to `y1`.

        (A cubic with the slopes at both ends is far off where those are not on the slow solution of a stiff problem.)
        """
        del x
        return jnp.asarray(self.scheme.c[self.scheme.implicit_stages], y0.dtype)[:, None] * (y1 - y0)

    def values(self, y0, w, x) -> tuple[list[Float[Array, " D"]], list[Float[Array, " D"]]]:
        """All `k` and `l` of a step, given its implicit stages."""
        scheme, k, l = self.scheme, [], []
        zero, remaining = jnp.zeros_like(y0), iter(w)
        for i in range(scheme.num_stages):
            offset = _sum(zero, (scheme.a[i, :i], k), (scheme.e[i, :i], l))
            if scheme.a[i, i] == 0:
                k.append(self.evaluate(self.field, scheme.c[i], x, y0 + offset))
            else:
                z = next(remaining)
                k.append((z - offset) / float(scheme.a[i, i]))
                offset = z
            if self.explicit_field is not None:
                l.append(self.evaluate(self.explicit_field, scheme.explicit_c[i], x, y0 + offset))
        return k, l

    def linearise(self, y0, w, x):
        """Columns of an array `(D, 1 + D)` are a change of the step as it is, and the derivative by each entry of `y0`."""
        at = self.iterate(y0, w, x, slopes=True)
        return LinearisedStep(at.increment + at.dy1[:, 0], at.dy1[:, 1:], at.dw[..., 0], at.dw[..., 1:])

    def solve(self, y0, w, x):
        w = self.solved(y0, w, x)
        return self.increment(w, *self.values(y0, w, x))

    def increment(self, w, k, l) -> Float[Array, " D"]:
        """`y1 - y0`: the last stage, and what the method adds to it."""
        scheme = self.scheme
        return _sum(w[-1], (scheme.b - scheme.a[-1], k), (scheme.f - scheme.e[-1], l))

    def solved(self, y0, guess, x):
        """The stages of the step from `y0`, by iteration from a guess; not finite where that does not converge."""
        point = (jnp.asarray(x[0]), jnp.asarray(x[1]), y0)
        return _solve_stages((self, point), lax.stop_gradient(guess))

    def shift(self, point, w):
        """The change of the stages by one Newton iteration."""
        t0, t1, y0 = point
        return self.iterate(y0, w, (t0, t1)).dw[..., 0]

    def iterate(self, y0, w, x, slopes: bool = False) -> "_Pass":
        """One Newton iteration on the stages `w`; with the derivative with respect to `y0`, if `slopes`.

        The stages are a loop, so that the field is compiled once for all of them.
        """
        scheme, size = self.scheme, y0.shape[0]
        seed = jnp.zeros((size, 1), y0.dtype)
        seed = jnp.concatenate([seed, jnp.eye(size, dtype=y0.dtype)], axis=1) if slopes else seed
        k, l = (jnp.zeros((scheme.num_stages, size), y0.dtype) for _ in range(2))
        dk, dl = (jnp.zeros((scheme.num_stages, *seed.shape), y0.dtype) for _ in range(2))
        begin = scheme.implicit_stages[0]
        if begin > 0:
            k, dk = self._explicit_stage(self.field, scheme.c, 0, x, y0, seed, k, dk)
            if self.explicit_field is not None:
                l, dl = self._explicit_stage(self.explicit_field, scheme.explicit_c, 0, x, y0, seed, l, dl)

        def stage(carry, inputs):
            k, l, dk, dl, _ = carry
            i, z = inputs
            a, e = (jnp.asarray(coefficients, y0.dtype)[i] for coefficients in (scheme.lower, scheme.e))
            gamma = jnp.asarray(scheme.diagonal, y0.dtype)[i]
            known, dknown = a @ k + e @ l, seed + jnp.tensordot(a, dk, 1) + jnp.tensordot(e, dl, 1)
            field = ft.partial(self.evaluate, self.field, jnp.asarray(scheme.c)[i], x)
            value, jacobian = _with_jacobian(field, y0 + z)
            lacking = jnp.pad((known + gamma * value - z)[:, None], ((0, 0), (0, seed.shape[1] - 1)))
            dat = _solve(jnp.eye(size, dtype=y0.dtype) - gamma * jacobian, dknown + lacking)
            k, dk = k.at[i].set((z - known) / gamma), dk.at[i].set((dat - dknown) / gamma)
            if self.explicit_field is not None:
                l, dl = self._explicit_stage(self.explicit_field, scheme.explicit_c, i, x, y0 + z, dat, l, dl)
            return (k, l, dk, dl, dat), dat - seed

        stages = (jnp.asarray(scheme.implicit_stages), w)
        (k, l, dk, dl, dat), dw = lax.scan(stage, (k, l, dk, dl, seed), stages)
        # What follows the last stage does so without large numbers that cancel.
        dy1 = _sum(dat, (scheme.b - scheme.a[-1], dk), (scheme.f - scheme.e[-1], dl))
        return _Pass(self.increment(w, k, l), dw, dy1)

    def _explicit_stage(self, field, c, i, x, at, dat, k, dk):
        value, jacobian = _with_jacobian(ft.partial(self.evaluate, field, jnp.asarray(c)[i], x), at)
        return k.at[i].set(value), dk.at[i].set(jacobian @ dat)


class _Pass(eqx.Module):
    """One Newton iteration on the stages of a step: the increment before it; the changes of the implicit stages and of `y1`."""

    increment: Float[Array, " D"]
    dw: Float[Array, " S D K"]
    dy1: Float[Array, " D K"]


@eqx.filter_custom_jvp
def _solve_stages(step, guess):
    """The stages of one step, by Newton's method from a guess; not finite where it does not converge. `step` is the
    equations, and the times and the state that they are for."""
    equations, point = step
    eps = equations.eps

    def keep_going(carry):
        _, count, converged = carry
        return (count < _MAX_ITERATIONS) & ~converged

    def body(carry):
        w, count, _ = carry
        shift = equations.shift(point, w)
        w = w + shift
        # The next shift would be about the square of this one.
        size = jnp.max(jnp.abs(jnp.concatenate([point[2][None], point[2] + w])), axis=0)
        small = jnp.abs(shift) <= eps**0.5 * size + 64 * eps * jnp.max(size)
        return w, count + 1, jnp.all(small)

    w, _, converged = lax.while_loop(keep_going, body, (guess, 0, jnp.array(False)))
    return jnp.where(converged, w, jnp.nan)


@_solve_stages.def_jvp
def _solve_stages_jvp(primals, tangents):
    step, guess = primals
    t_step, _ = tangents
    w = _solve_stages(step, guess)
    is_none = lambda x: x is None
    constant, variable = eqx.partition(step, jtu.tree_map(is_none, t_step, is_leaf=is_none), is_leaf=is_none)

    def shift(variable):
        equations, point = eqx.combine(variable, constant, is_leaf=is_none)
        return equations.shift(point, w)

    # At the solution, the derivative of one more iteration is that of the solution.
    return w, jax.jvp(shift, (variable,), (t_step,))[1]


class DiagonallyImplicitStep(AbstractScout):
    """Diagonally implicit (DIRK, SDIRK, ESDIRK) and implicit-explicit Runge-Kutta methods, all at once.

    The stages `z_i = Y_i - y0` of every step are unknowns beside the states: `z_i = p_i + a_ii h f(t_i, y0 + z_i)`, where
    `p_i = sum_{j<i} a_ij k_j` and `k_j = (z_j - p_j) / a_jj`. Linearised about an iterate, with `J_i = h f_y` at stage `i`,

        (I - a_ii J_i) dY_i = d + dp_i + (p_i + a_ii h f - z_i),    dk_i = (dY_i - d - dp_i) / a_ii,

    which is solved stage by stage for `D + 1` right-hand sides at once: what the stages lack, and how they follow a change
    `d` of the state that the step starts from. What remains is one linear recurrence in the states. Where the method is
    stiffly accurate, its matrix is read off the last stage: no large numbers cancel, however stiff the problem. (With
    `k_i` as unknowns, `Y_i` is the sum of numbers as large as the step size times the stiffness, which do not
    follow a change of `y0` to first order as well as the states do: Robertson's reaction diverges after two iterations.)

    An iteration costs one evaluation of the field and its Jacobian, and one elimination, per stage and step; memory
    `N S D^2` for `S` implicit stages. A step by itself (coarse guesses, steps in sequence) iterates in the same way.

    **Arguments:** a Runge-Kutta solver of Diffrax with a diagonally implicit tableau, by itself or beside an explicit one,
    or `diffrax.ImplicitEuler`; `terms`, `args`; `y0`. The solver's own root finder is not used.

    ??? cite "Reference"

        Kennedy and Carpenter, "Diagonally implicit Runge-Kutta methods for ordinary differential equations. A review",
        NASA/TM-2016-219173 (2016).
    """

    solver: dfx.AbstractSolver
    terms: PyTree[dfx.AbstractTerm]
    args: PyTree
    equations: _Equations
    ravel: Ravel = eqx.field(static=True)

    @staticmethod
    def supports(solver: dfx.AbstractSolver) -> bool:
        """Whether the solver is given by such tableaus alone."""
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
    def make(cls, solver: dfx.AbstractSolver, terms, y0, args, time_dtype=None) -> "DiagonallyImplicitStep":
        """The step map of `solver` for states like `y0`."""
        scheme, ravel = _scheme(type(solver)), Ravel(y0)
        explicit, implicit = terms.terms if scheme.multiple else (None, terms)
        time = jnp.zeros((), jnp.result_type(float) if time_dtype is None else time_dtype)
        examples = (time, time, time, jnp.zeros(ravel.size, ravel.dtype))

        def field(term):
            def evaluate(c, t0, t1, y):
                # As Diffrax does: no rounding in the time of a stage at the end of the step.
                t = jnp.where(c == 1, t1, t0 + c * (t1 - t0))
                return ravel.ravel(term.vf_prod(t, ravel.unravel(y), args, term.contr(t0, t1)))

            return eqx.filter_closure_convert(evaluate, *examples)

        explicit_field = None if explicit is None else field(explicit)
        equations = _Equations(field(implicit), explicit_field, ravel.eps, scheme)
        return cls(solver, terms, args, equations, ravel)

    @property
    def has_increment(self):
        return True

    @property
    def stages(self):
        return self.equations

    def increment(self, t0, t1, y0):
        y = self.ravel.ravel(y0)
        return self.ravel.unravel(self.equations.solve(y, self.equations.guess(y, y, (t0, t1)), (t0, t1)))

    @property
    def scout(self):
        solver = dfx.KenCarp3() if self.equations.scheme.multiple else dfx.Kvaerno3()
        equations = self.equations
        scheme = _scheme(type(solver))
        equations = _Equations(equations.field, equations.explicit_field, equations.eps, scheme)
        return DiagonallyImplicitStep(solver, self.terms, self.args, equations, self.ravel)

    def slope(self, t, y):
        parts = self.terms.terms if self.equations.scheme.multiple else (self.terms,)
        slopes = [term.vf(t, y, self.args) for term in parts]
        return jtu.tree_map(lambda *x: sum(x[1:], x[0]), *slopes)

    def trial(self, t0, t1, y0, slope):
        equations, ravel, x = self.equations, self.ravel, (t0, t1)
        scheme, y, h = equations.scheme, ravel.ravel(y0), t1 - t0
        guess = equations.guess(y, y + h * ravel.ravel(slope), x)
        w = equations.solved(y, guess, x)
        k, l = equations.values(y, w, x)
        error = _sum(jnp.zeros_like(y), (scheme.b_error, k), (scheme.f_error, l))
        end = y + equations.increment(w, k, l)
        # The last stage is at the end.
        slope = (k[-1] + l[-1] if scheme.multiple else k[-1]) / h
        return ravel.unravel(end), ravel.unravel(error), ravel.unravel(slope)

    def __call__(self, t0, t1, y0, y1=None):
        """As of any step map. `y1`, if it is known, is where the iteration on the stages begins."""
        equations, scheme, ravel, x = self.equations, self.equations.scheme, self.ravel, (t0, t1)
        y = ravel.ravel(y0)
        guess = equations.guess(y, y if y1 is None else ravel.ravel(y1), x)
        w = equations.solved(y, guess, x)
        k, l = equations.values(y, w, x)
        increment = equations.increment(w, k, l)
        end = ravel.unravel(y + increment)
        error = _sum(jnp.zeros_like(y), (scheme.b_error, k), (scheme.f_error, l))
        converged = jnp.all(jnp.isfinite(increment))
        result = dfx.RESULTS.where(
            converged,
            dfx.RESULTS.successful,
            dfx.RESULTS.nonlinear_divergence,  # pyright: ignore
        )
        dense_info = {"y0": y0, "y1": end}
        if isinstance(self.solver, dfx.AbstractRungeKutta):
            k = self._stack(k)
            dense_info["k"] = (self._stack(l), k) if scheme.multiple else k
        return StepOutput(end, ravel.unravel(error), dense_info, result)

    def _stack(self, ks):
        return jtu.tree_map(lambda *k: jnp.stack(k), *map(self.ravel.unravel, ks))
