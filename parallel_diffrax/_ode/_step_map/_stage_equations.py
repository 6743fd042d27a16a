"""The equations for the stages of one diagonally implicit step."""

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
from jaxtyping import Array, Float

from ..._recurrence import AbstractStages, LinearisedStep
from ..._scan import eliminate


# The largest number of Newton iterations on the stages of a step by itself.
_MAX_ITERATIONS = 20
# How far the last stage may be from the end of a step, relative to the state: of an implicit method, and of an
# implicit-explicit one, whose last stage is apart from the end by an error of low order.
_ELSEWHERE = {False: 1e-4, True: 0.01}
# Coefficients of Diffrax's tableaus that should be equal differ by rounding, at most by this.
_ROUNDING = 1e-13


class Scheme:
    """The coefficients of a method with an implicit part and an optional explicit part.

    Stage `i` is `Y_i = y0 + sum_{j<=i} a_ij k_j + sum_{j<i} e_ij l_j`, with `k_i = h f(t_i, Y_i)` for the field of the
    implicit part and `l_i` for that of the explicit part. The step is `y1 = y0 + sum_j (b_j k_j + f_j l_j)`. A tableau
    with a single implicit stage begins with an explicit stage that enters the error estimate only.
    """

    def __init__(self, cls: type[dfx.AbstractSolver]):
        tableau: Any = getattr(cls, "tableau", None)
        if tableau is None:
            # Diffrax's implicit Euler method has no tableau; its error estimate is the difference to the trapezoidal rule.
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
        self.e, self.f, self.f_error = np.zeros_like(self.a), np.zeros_like(self.b), np.zeros_like(self.b)
        self.explicit_c = self.c
        if explicit is not None:
            self.e, self.f, self.f_error = _square(explicit), explicit.b_sol, explicit.b_error
            self.explicit_c = np.concatenate([[0.0], explicit.c])
        self.num_stages = len(self.b)
        self.implicit_stages = [i for i in range(self.num_stages) if self.a[i, i] != 0]
        assert self.implicit_stages == list(range(self.num_stages))[-len(self.implicit_stages) :]


# A static field has to be the same object for each solver class.
scheme_of = ft.cache(Scheme)


def _square(tableau: dfx.ButcherTableau) -> np.ndarray:
    size = len(tableau.b_sol)
    a = np.zeros((size, size))
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = row
    return a


def weighted_sum(start, *weighted):
    """`start + sum of weights * arrays` over the nonzero weights."""
    for weights, arrays in weighted:
        for w, x in zip(weights, arrays):
            if abs(w) > _ROUNDING:
                start = start + float(w) * x
    return start


def _solve(matrix: Float[Array, " D D"], rhs: Float[Array, " D K"]) -> Float[Array, " D K"]:
    # The derivative is another solve; otherwise JAX would differentiate every operation of the elimination.
    return lax.custom_linear_solve(
        lambda x: matrix @ x,
        rhs,
        solve=lambda _, b: eliminate(matrix, b),
        transpose_solve=lambda _, b: eliminate(matrix.T, b),
    )


def _with_jacobian(fn: Callable, y: Float[Array, " D"]) -> tuple[Float[Array, " D"], Float[Array, " D D"]]:
    return jax.vmap(lambda e: jax.jvp(fn, (y,), (e,)), out_axes=(None, 1))(jnp.eye(y.shape[0], dtype=y.dtype))


class StageEquations(AbstractStages):
    """The equations for the implicit stages of one step, for raveled states and inputs `(t0, t1)`.

    `field(c, t0, t1, y)` is `h f` at the time `t0 + c h` for the implicit part, `explicit_field` for the explicit part.
    Neither has arrays in closures, so that both can be differentiated in everything that they depend on. `eps` is the
    machine epsilon of the states.
    """

    field: Callable
    explicit_field: Callable | None
    eps: float = eqx.field(static=True)
    scheme: Scheme = eqx.field(static=True)

    @staticmethod
    def evaluate(field, c, x, y):
        """`h f` at the time of a stage, for the inputs `x = (t0, t1)`."""
        t0, t1 = jnp.asarray(x[0]), jnp.asarray(x[1])
        return field(jnp.asarray(c, t0.dtype), t0, t1, y)

    def guess(self, y0, y1, x):
        """Stages on the straight line from `y0` to `y1`.

        (A cubic with the slopes at both ends is far off if these states are not on the slow solution of a stiff problem.)
        """
        del x
        return jnp.asarray(self.scheme.c[self.scheme.implicit_stages], y0.dtype)[:, None] * (y1 - y0)[None]

    def values(self, y0, w, x) -> tuple[list[Float[Array, " D"]], list[Float[Array, " D"]]]:
        """All `k` and `l` of a step from its implicit stages `w`."""
        scheme, k, l = self.scheme, [], []
        zero, remaining = jnp.zeros_like(y0), iter(w)
        for i in range(scheme.num_stages):
            offset = weighted_sum(zero, (scheme.a[i, :i], k), (scheme.e[i, :i], l))
            if scheme.a[i, i] == 0:
                k.append(self.evaluate(self.field, scheme.c[i], x, y0 + offset))
            else:
                z = next(remaining)
                k.append((z - offset) / float(scheme.a[i, i]))
                offset = z
            if self.explicit_field is not None:
                l.append(self.evaluate(self.explicit_field, scheme.explicit_c[i], x, y0 + offset))
        return k, l

    def solve(self, y0, y1, x):
        w = self.solve_stages(y0, x, y1)
        return self.increment(w, *self.values(y0, w, x))

    def increment(self, w, k, l) -> Float[Array, " D"]:
        """`y1 - y0`: the last stage, plus the difference between it and the end of the step."""
        scheme = self.scheme
        return weighted_sum(w[-1], (scheme.b - scheme.a[-1], k), (scheme.f - scheme.e[-1], l))

    def solve_stages(self, y0, x, y1=None):
        """The stages of the step from `y0`, by Newton's method from the line to `y0` itself; NaN if it does not converge.

        If `y1` is known, the state after the step, it starts on the line there. Equations with several solutions may lead
        from there to the stages of another step. If its last stage is far from `y1`, or there is none, it starts again."""
        alone = self.guess(y0, y0, x)
        guesses = (alone, None, None) if y1 is None else (self.guess(y0, y1, x), alone, y1 - y0)
        point = (jnp.asarray(x[0]), jnp.asarray(x[1]), y0)
        return _solve_stages((self, point), lax.stop_gradient(guesses))

    def shift(self, point, w):
        """The change of the stages `w` in one Newton iteration at `point = (t0, t1, y0)`, stage by stage: each one follows
        the new values of those before it. So it takes no Jacobian of the explicit part, which may be infinite where its
        values are finite, as that of a square root is at zero."""
        (*x, y0), scheme = point, self.scheme
        k, l = (jnp.zeros((scheme.num_stages, y0.shape[0]), y0.dtype) for _ in range(2))
        if scheme.implicit_stages[0] > 0:
            k = k.at[0].set(self.evaluate(self.field, scheme.c[0], x, y0))
            if self.explicit_field is not None:
                l = l.at[0].set(self.evaluate(self.explicit_field, scheme.explicit_c[0], x, y0))

        def stage(carry, inputs):
            k, l = carry
            i, z = inputs
            offset, gamma, residual, matrix = self._newton(k, l, i, z, x, y0)
            # Where a slope is infinite, the solution of the linear system is zero, whatever the residual is.
            finite = jnp.all(jnp.isfinite(matrix))
            matrix = jnp.where(finite, matrix, jnp.eye(y0.shape[0], dtype=y0.dtype))
            new = z + _solve(matrix, residual[:, None])[:, 0]
            k = k.at[i].set((new - offset) / gamma)
            if self.explicit_field is not None:
                l = l.at[i].set(self.evaluate(self.explicit_field, jnp.asarray(scheme.explicit_c)[i], x, y0 + new))
            return (k, l), new - z

        return lax.scan(stage, (k, l), (jnp.asarray(scheme.implicit_stages), w))[1]

    def _newton(self, k, l, i, z, x, y0):
        """Of the equation of stage `i` at `z`: the part that earlier stages give, `a_ii`, and the residual and the matrix of
        Newton's method."""
        scheme = self.scheme
        a, e, gamma = (jnp.asarray(part, y0.dtype)[i] for part in (scheme.lower, scheme.e, scheme.diagonal))
        offset = a @ k + e @ l
        value, jacobian = _with_jacobian(ft.partial(self.evaluate, self.field, jnp.asarray(scheme.c)[i], x), y0 + z)
        return offset, gamma, offset + gamma * value - z, jnp.eye(y0.shape[0], dtype=y0.dtype) - gamma * jacobian

    def linearise(self, y0, w, x):
        """One Newton iteration on all stages at once, in a loop over them, so that the field is compiled once. Beside the
        Newton correction, the first column, it carries the derivative with respect to `y0` in `D` others."""
        scheme, size = self.scheme, y0.shape[0]
        seed = jnp.concatenate([jnp.zeros((size, 1), y0.dtype), jnp.eye(size, dtype=y0.dtype)], axis=1)
        k, l = (jnp.zeros((scheme.num_stages, size), y0.dtype) for _ in range(2))
        dk, dl = (jnp.zeros((scheme.num_stages, *seed.shape), y0.dtype) for _ in range(2))
        begin = scheme.implicit_stages[0]
        if begin > 0:
            k, dk = self._first_stage(self.field, scheme.c, x, y0, seed, k, dk)
            if self.explicit_field is not None:
                l, dl = self._first_stage(self.explicit_field, scheme.explicit_c, x, y0, seed, l, dl)

        def stage(carry, inputs):
            k, l, dk, dl, _ = carry
            i, z = inputs
            offset, gamma, residual, matrix = self._newton(k, l, i, z, x, y0)
            a, e = (jnp.asarray(coefficients, y0.dtype)[i] for coefficients in (scheme.lower, scheme.e))
            doffset = seed + jnp.tensordot(a, dk, 1) + jnp.tensordot(e, dl, 1)
            residual = jnp.where(jnp.all(jnp.isfinite(matrix)), residual, jnp.nan)
            dstage = _solve(matrix, doffset + jnp.pad(residual[:, None], ((0, 0), (0, size))))
            k, dk = k.at[i].set((z - offset) / gamma), dk.at[i].set((dstage - doffset) / gamma)
            if self.explicit_field is not None:
                l, dl = self._explicit_stage(self.explicit_field, scheme.explicit_c, i, x, y0 + z, dstage, l, dl)
            return (k, l, dk, dl, dstage), dstage - seed

        stages = (jnp.asarray(scheme.implicit_stages), w)
        (k, l, dk, dl, dstage), dw = lax.scan(stage, (k, l, dk, dl, seed), stages)
        # Computed from the last stage, so that no large numbers cancel.
        dy1 = weighted_sum(dstage, (scheme.b - scheme.a[-1], dk), (scheme.f - scheme.e[-1], dl))
        return LinearisedStep(self.increment(w, k, l) + dy1[:, 0], dy1[:, 1:], dw[..., 0], dw[..., 1:])

    def _first_stage(self, field, c, x, y0, seed, k, dk):
        """Stage 0, the state `y0`, which the Newton correction does not change."""
        value, jacobian = _with_jacobian(ft.partial(self.evaluate, field, jnp.asarray(c)[0], x), y0)
        return k.at[0].set(value), dk.at[0].set(jnp.concatenate([seed[:, :1], jacobian], axis=1))

    def _explicit_stage(self, field, c, i, x, stage, dstage, k, dk):
        value, jacobian = _with_jacobian(ft.partial(self.evaluate, field, jnp.asarray(c)[i], x), stage)
        return k.at[i].set(value), dk.at[i].set(jacobian @ dstage)


@eqx.filter_custom_jvp
def _solve_stages(step, guesses):
    """See `StageEquations.solve_stages`. `step` is the pair of the equations and `(t0, t1, y0)`. `guesses` are the first one
    and, if the end of the step is known, a second one and `y1 - y0`."""
    equations, point = step
    guess, second, target = guesses
    eps, y0 = equations.eps, point[2]
    limit = _MAX_ITERATIONS * (1 if second is None else 2)

    def keep_going(carry):
        _, count, converged = carry
        return (count < limit) & ~converged

    def body(carry):
        w, count, _ = carry
        shift = equations.shift(point, w)
        w, count = w + shift, count + 1
        # Newton's method converges quadratically: the next shift would be about the square of this one.
        size = jnp.max(jnp.abs(jnp.concatenate([y0[None], y0[None] + w])), axis=0, keepdims=True)
        small = jnp.abs(shift) <= eps**0.5 * size + 64 * eps * jnp.max(size, initial=0)
        converged = jnp.all(small)
        if second is not None:
            allowed = _ELSEWHERE[equations.scheme.multiple] * jnp.max(size, initial=0)
            elsewhere = jnp.max(jnp.abs(w[-1] - target), initial=0) > allowed
            # (The unused places of a window have one guess, and would double the iterations of all others.)
            elsewhere = elsewhere & jnp.any(guess != second)
            again = (count <= _MAX_ITERATIONS) & jnp.where(converged, elsewhere, count == _MAX_ITERATIONS)
            w, count = jnp.where(again, second, w), jnp.where(again, _MAX_ITERATIONS, count)
            converged = converged & ~again
        return w, count, converged

    w, _, converged = lax.while_loop(keep_going, body, (guess, 0, jnp.array(False)))
    return jnp.where(converged, w, jnp.nan)


@_solve_stages.def_jvp
def _solve_stages_jvp(primals, tangents):
    step, guesses = primals
    t_step, _ = tangents
    w = _solve_stages(step, guesses)
    is_none = lambda x: x is None
    constant, variable = eqx.partition(step, jtu.tree_map(is_none, t_step, is_leaf=is_none), is_leaf=is_none)

    def shift(variable):
        equations, point = eqx.combine(variable, constant, is_leaf=is_none)
        return equations.shift(point, w)

    # At the solution, one more iteration has the derivative of the solution.
    return w, jax.jvp(shift, (variable,), (t_step,))[1]
