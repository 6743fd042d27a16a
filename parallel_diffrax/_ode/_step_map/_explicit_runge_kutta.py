"""Explicit Runge-Kutta methods, with the loop over their stages unrolled where that is faster."""

from typing import cast, TypeGuard

import diffrax as dfx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ..._kernels import largest_array, scalarise
from ._base import AbstractEmbeddedSolver, AbstractStepMap, compiled_apart, StepOutput


# Up to this many scalar operations in all stages together, they are unrolled on a CPU: as many as a step in scalars has.
_MOST_OPERATIONS = 2000.0
# A field with larger arrays takes too much memory for a loop that XLA compiles as one function.
_LARGEST_ARRAY = 32


def _combine(weights, ks: list[PyTree]) -> PyTree | None:
    """`sum_j weights[j] ks[j]` over the nonzero weights; `None` if all are zero."""
    used = [(float(w), k) for w, k in zip(weights, ks) if w != 0]
    if len(used) == 0:
        return None
    combine = lambda *k: sum((w * kj for (w, _), kj in zip(used[1:], k[1:])), used[0][0] * k[0])
    return jtu.tree_map(combine, *[k for _, k in used])


def _add(y: PyTree, increment: PyTree | None) -> PyTree:
    return y if increment is None else jtu.tree_map(lambda a, b: (a + b).astype(a.dtype), y, increment)


def _stacked(ks: list[PyTree]) -> PyTree:
    return jtu.tree_map(lambda *k: jnp.stack(k), *ks)


class ExplicitRungeKuttaStep(AbstractEmbeddedSolver):
    """An explicit Runge-Kutta step with any Diffrax tableau, its stages unrolled:

        k_i = h f(t0 + c_i h, y0 + sum_{j<i} a_ij k_j),    y1 = y0 + sum_j b_j k_j.

    (On a CPU, the stages of a field with many operations on small arrays are a loop.) Diffrax makes the stages in a `while`
    loop. XLA fuses unrolled stages into one kernel: on a GPU a sequential step costs
    17 times less, and an evaluation of all steps at once is a single pass over memory. The vector field is evaluated once
    per stage (once less if only `y1` is used and the last stage is the first of the next step).
    """

    solver: dfx.AbstractERK
    terms: PyTree[dfx.AbstractTerm]
    args: PyTree

    @staticmethod
    def supports(solver: dfx.AbstractSolver) -> TypeGuard[dfx.AbstractERK]:
        """Whether a tableau alone defines the solver. A wrapper, or a subclass with its own `step`, is not supported."""
        cls = type(solver)
        return (
            issubclass(cls, dfx.AbstractERK)
            and isinstance(cls.tableau, dfx.ButcherTableau)
            and cls.step is dfx.AbstractERK.step
            and cls.init is dfx.AbstractERK.init
        )

    @property
    def _tableau(self) -> dfx.ButcherTableau:
        return cast(dfx.ButcherTableau, self.solver.tableau)

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage of a step is the first of the next one."""
        return bool(self._tableau.fsal)

    @property
    def has_increment(self):
        return True

    def increment(self, t0, t1, y0):
        return self._stages(t0, t1, y0)[1]

    @property
    def embedded_solver(self):
        estimates = self.solver.error_order(self.terms) is not None and bool(self._tableau.b_error.any())
        return self if estimates else ExplicitRungeKuttaStep(dfx.Bosh3(), self.terms, self.args)

    def slope(self, t, y):
        return self.terms.vf(t, y, self.args)

    def trial(self, t0, t1, y0, slope):
        del slope
        ks, increment = self._stages(t0, t1, y0)
        y1 = _add(y0, increment)
        return y1, _combine(self._tableau.b_error, ks), self.slope(t1, y1)

    def step_from(self, t0, t1, y0: PyTree, slope: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """A step of a method whose last stage is the first of the next step, on an ordinary differential equation. `slope`
        is `f(t0, y0)`. Returns the state at `t1`, the error estimate, and `f(t1, y1)`."""
        y1, error, slope, _ = self.step_with_stages_from(t0, t1, y0, slope)
        return y1, error, slope

    def step_with_stages_from(self, t0, t1, y0: PyTree, slope: PyTree) -> tuple[PyTree, PyTree, PyTree, list[PyTree]]:
        """Like `step_from`, with the stages."""
        control = self.terms.contr(t0, t1)
        ks, increment = self._stages(t0, t1, y0, self.terms.prod(slope, control), last=False)
        y1 = _add(y0, increment)
        slope = self.slope(t1, y1)
        ks = [*ks, self.terms.prod(slope, control)]
        return y1, _combine(self._tableau.b_error, ks), slope, ks

    def __call__(self, t0, t1, y0, y1=None):
        del y1
        ks, increment = self._stages(t0, t1, y0)
        y1 = _add(y0, increment)
        y_error = _combine(self._tableau.b_error, ks)
        if y_error is None:
            y_error = jtu.tree_map(jnp.zeros_like, y0)
        dense_info = {"y0": y0, "y1": y1, "k": _stacked(ks)}
        return StepOutput(y1, y_error, dense_info, dfx.RESULTS.successful)

    def _stages(self, t0, t1, y0, first: PyTree = None, last: bool = True) -> tuple[list[PyTree], PyTree]:
        """`k_1, ..., k_s` and `sum_j b_j k_j`. If `first` is given, it is `k_1`. Without the `last`, `k_s` is left out, on
        which the sum does not depend."""
        tableau, control, h = self._tableau, self.terms.contr(t0, t1), t1 - t0
        ks = [self.terms.vf_prod(t0, y0, self.args, control) if first is None else first]
        rows = list(zip(tableau.a_lower, tableau.c))[: None if last else -1]
        if self._unrolls(t0, y0, control):
            # (Operations on large arrays take longer apart.)
            is_small = jax.default_backend() == "cpu" and not self._is_costly(t0, y0, control)
            for a, c in rows:
                # As in Diffrax: a stage at the end of the step has no rounding in its time.
                t = t1 if c == 1 else t0 + jnp.asarray(c, jnp.result_type(h)) * h
                k = self.terms.vf_prod(t, _add(y0, _combine(a, ks)), self.args, control)
                ks.append(compiled_apart(k) if is_small else k)
        else:
            ks = self._stages_in_loop(t0, t1, y0, control, ks[0], rows)
        # As in Diffrax, a stage that is not finite makes the step so, even without weight: a field need not pass on NaN.
        without_weight = [k for w, k in zip(tableau.b_sol[:-1], ks) if w == 0]
        add = lambda x, *k: sum((0 * kj for kj in k), x)
        return ks, jtu.tree_map(add, _combine(tableau.b_sol, ks), *without_weight)

    def _unrolls(self, t0, y0, control) -> bool:
        """Whether the loop over stages is unrolled. Not on a CPU if the field has many operations of small arrays: XLA
        compiles a loop there as one function only if it takes little memory, and makes any other operation by operation,
        which takes ten times as long (JAX 0.10.2, 300 operations of scalars). Large arrays are slow in either way."""
        if jax.default_backend() != "cpu":
            return True
        field = lambda t, y: self.terms.vf_prod(t, y, self.args, control)
        return largest_array(field, t0, y0) > _LARGEST_ARRAY or not self._is_costly(t0, y0, control)

    def _is_costly(self, t0, y0, control) -> bool:
        field = lambda t, y: self.terms.vf_prod(t, y, self.args, control)
        most = _MOST_OPERATIONS / len(self._tableau.b_sol)
        return scalarise(field, t0, y0, max_cost=most) is None

    def is_costly(self, t0, t1, y0: PyTree) -> bool:
        """Whether a step has more operations than one that is made in scalars on a CPU."""
        return self._is_costly(t0, y0, self.terms.contr(t0, t1))

    def _stages_in_loop(self, t0, t1, y0, control, first: PyTree, rows: list) -> list[PyTree]:
        """The stages from the `first` on, with the `rows` of the tableau, in a loop."""
        if len(rows) == 0:
            return [first]
        time_dtype = jnp.result_type(t0, t1)
        weights = np.stack([np.pad(a, (0, len(rows) + 1 - len(a))) for a, _ in rows])
        cs = np.array([c for _, c in rows])
        zeros = jtu.tree_map(lambda k: jnp.zeros((len(rows) + 1, *k.shape), k.dtype), first)
        start = jtu.tree_map(lambda x, k: x.at[0].set(k), zeros, first)

        def body(ks, row):
            index, a, c, at_end = row
            t = jnp.where(at_end, t1, t0 + c * (t1 - t0))

            def combine(k):
                weight = a.astype(k.dtype).reshape(-1, *[1] * (k.ndim - 1))
                # A stage without weight adds nothing, even if it is infinite.
                return jnp.sum(jnp.where(weight == 0, 0, weight * k), axis=0)

            new = self.terms.vf_prod(t, _add(y0, jtu.tree_map(combine, ks)), self.args, control)
            return jtu.tree_map(lambda x, k: x.at[index].set(k), ks, new), None

        index = jnp.arange(1, len(rows) + 1)
        scanned = index, jnp.asarray(weights), jnp.asarray(cs, time_dtype), jnp.asarray(cs == 1)
        ks, _ = lax.scan(body, start, scanned)
        return [jtu.tree_map(lambda x, i=i: x[i], ks) for i in range(len(rows) + 1)]


class StepWithStages(AbstractStepMap):
    """An explicit Runge-Kutta step whose stages are part of the state after it, as if they were a solver state. Dense output
    and its derivative then need no second evaluation of the step, however many outputs it has."""

    solver: dfx.AbstractERK
    terms: PyTree[dfx.AbstractTerm]
    step: ExplicitRungeKuttaStep

    @classmethod
    def of(cls, step: ExplicitRungeKuttaStep) -> "StepWithStages":
        """That of a step."""
        return cls(step.solver, step.terms, step)

    @property
    def has_solver_state(self):
        return True

    @property
    def first_same_as_last(self) -> bool:
        """That of the step."""
        return self.step.first_same_as_last

    def start(self, t0, t1, y0: PyTree) -> tuple[PyTree, PyTree]:
        """The state before the first step."""
        info = jax.eval_shape(lambda t0, t1, y0: self.step(t0, t1, y0).dense_info["k"], t0, t1, y0)
        return y0, jtu.tree_map(lambda k: jnp.zeros(k.shape, k.dtype), info)

    def end(self, state):
        return state

    def slope(self, t, state):
        """That of the step."""
        return self.step.slope(t, state[0])

    def step_from(self, t0, t1, state, slope):
        """That of the step."""
        y1, error, slope, stages = self.step.step_with_stages_from(t0, t1, state[0], slope)
        return (y1, _stacked(stages)), error, slope

    def __call__(self, t0, t1, y0, y1=None):
        del y1
        output = self.step(t0, t1, y0[0])
        return StepOutput((output.y1, output.dense_info["k"]), output.y_error, output.dense_info, output.result)
