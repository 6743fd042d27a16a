"""What all root finders of this package have in common."""

import abc
import math
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, PyTree

from .._scan import AbstractScan, AbstractTransitions, check_instance, preceded_by, row_at, shift, with_row
from ._contraction_monitor import ContractionMonitor
from ._convergence_monitor import ConvergenceMonitor
from ._jacobian import AbstractJacobian
from ._ravel import Ravel
from ._recurrence import Recurrence
from ._stages import LinearisedStep
from ._tolerance import effective_scale, num_leading_true, rounding_size, Tolerance


# An update that is larger than this many times the largest number in the guess has left the region in which the
# linearisation means anything: from there on the step is not taken.
_LARGEST_UPDATE = 1e2


class RootFinderState(eqx.Module):
    """Between two iterations: `largest`, the largest update that is taken; `size`, the size of the numbers that each entry
    was computed from, where Jacobians are exact; `progress`; `outlook`, where it is asked for; the inner unknowns of the
    steps, where they have any; and what the method itself remembers."""

    largest: Float[Array, ""]
    size: PyTree[Array]
    convergence: ConvergenceMonitor
    contraction: ContractionMonitor | None
    stages: Float[Array, " N S D"] | None
    method_state: PyTree[Array]


class AbstractParallelRootFinder(optx.AbstractRootFinder):
    """Iterates on all steps of a recurrence at once. A new method implements `iterate`, and `start` if it remembers
    anything from one iteration to the next.

    The options of `optimistix.root_find` that it knows: `resolution`, the machine epsilon of the states' own dtype;
    `watch`, with which Newton's method iterates only on the leading steps on which it contracts (`ContractionMonitor`); `max_growth`,
    with which it then gives up if perturbations grow by more than the exponential of that over the first `reach` steps, by
    default all.
    """

    rtol: eqx.AbstractVar[float | Float[Array, ""]]
    atol: eqx.AbstractVar[float | Float[Array, ""]]
    norm: eqx.AbstractVar[Callable[[PyTree], Float[Array, ""]]]
    jacobian: eqx.AbstractVar[AbstractJacobian]
    scan: eqx.AbstractVar[AbstractScan]

    @abc.abstractmethod
    def iterate(
        self,
        residual: Callable[[Float[Array, " N D"]], tuple[Float[Array, " N D"], PyTree]],
        r: Float[Array, " N D"],
        transitions: AbstractTransitions,
        y: Float[Array, " N D"],
        tolerance: Tolerance,
        largest: Float[Array, ""],
        method_state: PyTree[Array],
    ) -> tuple[Float[Array, " N D"], Float[Array, " N D"], Bool[Array, " N"], PyTree[Array]]:
        """One iteration.

        **Arguments:**

        - `residual`: the residual as a function of the states, with its auxiliary output.
        - `r`, `transitions`: the residual at `y`, linearised.
        - `y`: the states.
        - `tolerance`: what small means.
        - `largest`: the magnitude beyond which an update makes no sense.
        - `memory`: of the method.

        **Returns:** the new states, the update that led there, the steps to which it was applied, the new memory.
        """

    @property
    @abc.abstractmethod
    def exact(self) -> bool:
        """Whether updates are Newton's."""

    def start(self, y: Float[Array, " N D"]) -> PyTree[Array]:
        """What the method remembers at the beginning."""
        del y
        return None

    def __check_init__(self):
        name = type(self).__name__
        for field in ("rtol", "atol"):
            value = getattr(self, field)
            # Written so that NaN fails.
            if isinstance(value, (int, float)) and not value >= 0:
                raise ValueError(f"`{name}({field}={value!r})`: a tolerance must be a number of at least 0.")
            if isinstance(value, (int, float)) and field == "rtol" and 1 <= value < math.inf:
                raise ValueError(f"`{name}(rtol={value!r})`: a relative tolerance of 1 or more accepts anything.")
        check_instance(name, "jacobian", self.jacobian, AbstractJacobian, "Dense()")
        check_instance(name, "scan", self.scan, AbstractScan, "AssociativeScan()")
        if not callable(self.norm):
            raise TypeError(
                f"`{name}(norm={self.norm!r})`: expected a function from an array to a number, for example "
                "`optimistix.max_norm`."
            )

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        del fn, aux_struct, tags
        _check_residual(type(self).__name__, y, f_struct)
        ys, ravel = _ravel_steps(y)
        largest = jnp.max(jnp.abs(ys))
        # A guess of zeros says nothing about the size of the solution.
        largest = _LARGEST_UPDATE * jnp.where(largest > 0, largest, jnp.inf)
        num_steps, dtype = ys.shape[0], ravel.dtype
        return RootFinderState(
            largest=largest,
            size=y if self.jacobian.exact else None,
            convergence=ConvergenceMonitor.start(num_steps, dtype),
            contraction=ContractionMonitor.start(num_steps, dtype, "max_growth" in options)
            if self._watches(options)
            else None,
            stages=args.guess_stages(ys) if isinstance(args, Recurrence) else None,
            method_state=self.start(ys),
        )

    def _watches(self, options) -> bool:
        return self.exact and options.get("watch", False)

    def step(self, fn, y, args, options, state, tags):
        del tags
        ys, ravel = _ravel_steps(y)
        tolerance = Tolerance(self.rtol, self.atol, self.norm, options.get("resolution", ravel.eps))

        def plain(ys):
            r, aux = fn(jax.vmap(ravel.unravel)(ys), args)
            return jax.vmap(ravel.ravel)(r), aux

        stages = None if state.stages is None else StageCondensation.at(args, ys, state.stages)
        linear, residual = (plain, plain) if stages is None else (stages.linear, stages.residual)
        r, transitions, aux = self.jacobian.linearise(linear, ys)
        new_ys, d, applied, method_state = self.iterate(
            residual, r, transitions, ys, tolerance, state.largest, state.method_state
        )
        scale = tolerance.scale(new_ys)
        # An approximation does not tell what a step mixes, and for large states memory counts.
        size = rounding_size(transitions, scale) if self.jacobian.exact else scale
        scale = effective_scale(scale, size)
        contraction = state.contraction
        if contraction is not None:
            # An update that is rounding need not fall.
            at_rounding = tolerance.at_rounding(r, size) & tolerance.resolved(d, scale, size)
            contraction = contraction.after(
                transitions,
                jnp.where(tolerance.noise(d, size), 0, d),
                applied,
                at_rounding,
                tolerance,
                scale,
                options.get("max_growth"),
                options.get("reach", ys.shape[0]),
            )
            ahead = (jnp.arange(ys.shape[0]) < contraction.horizon)[:, None]
            new_ys, r, d = jnp.where(ahead, new_ys, ys), jnp.where(ahead, r, 0), jnp.where(ahead, d, 0)
            applied = applied | ~ahead[:, 0]
        convergence = state.convergence.after(tolerance, r, d, applied, scale, size, self.exact)
        kept = jax.vmap(ravel.unravel)(size) if self.jacobian.exact else None
        inner = None if stages is None else stages.follow(new_ys, applied)
        new_state = RootFinderState(state.largest, kept, convergence, contraction, inner, method_state)
        return jax.vmap(ravel.unravel)(new_ys), new_state, aux

    def terminate(self, fn, y, args, options, state, tags):
        del fn, args, options, tags
        failed, terminate = state.convergence.diverged, state.convergence.terminate
        if state.contraction is not None:
            # Whoever asked goes on from the horizon with a better guess.
            short = state.contraction.horizon < jtu.tree_leaves(y)[0].shape[0]
            failed = failed | state.contraction.growth_exceeded | (terminate & short)
            terminate = terminate | state.contraction.growth_exceeded
        result = optx.RESULTS.where(failed, optx.RESULTS.nonlinear_divergence, optx.RESULTS.successful)
        return terminate, result

    def postprocess(self, fn, y, aux, args, options, state, tags, result) -> tuple[PyTree, PyTree, dict[str, Any]]:
        convergence = state.convergence
        stats = {"num_converged": convergence.num_converged, "update": convergence.update}
        if state.stages is not None:
            stats["stages"] = state.stages
        if state.size is not None:
            stats["rounding_size"] = state.size
        if state.contraction is not None:
            contraction = state.contraction
            stats["horizon"] = contraction.horizon
            if contraction.growth is not None:
                stats["growth"] = contraction.growth
            stats["predicted_iterations"] = contraction.predicted
        return y, aux, stats


class StageCondensation(eqx.Module):
    """One Newton iteration on the inner unknowns of all steps: what is left is a recurrence of the states.

    `y`, `w` are the iterate, `r` its residual after the iteration on `w`, `step` all steps as affine functions.
    """

    recurrence: Recurrence
    y: Float[Array, " N D"]
    w: Float[Array, " N S D"]
    r: Float[Array, " N D"]
    step: LinearisedStep

    @classmethod
    def at(cls, recurrence: Recurrence, y, w) -> "StageCondensation":
        """The elimination at an iterate."""
        return cls(recurrence, y, w, *recurrence.linearised(y, w))

    def linear(self, y):
        """The residual as an affine function of the states."""
        change = self.recurrence.previous(y) - self.recurrence.previous(self.y)
        return self.r + jnp.einsum("nij,nj->ni", self.step.matrix, change, precision="highest") - (y - self.y), None

    def residual(self, y):
        """The residual at other states, with inner unknowns that followed them, after another iteration on these."""
        return self.recurrence.linearised(y, self._followed(y))[0], None

    def follow(self, y, applied):
        """The inner unknowns for the next iterate: new guesses for steps from where no update was taken."""
        w = self._followed(y)
        usable = applied & preceded_by(True, applied) & jnp.all(jnp.isfinite(w), axis=(1, 2))
        return jnp.where(usable[:, None, None], w, cast(Array, self.recurrence.guess_stages(y)))

    def _followed(self, y):
        change = self.recurrence.previous(y) - self.recurrence.previous(self.y)
        return self.w + self.step.shift + jnp.einsum("nsij,nj->nsi", self.step.slope, change, precision="highest")


def safeguarded_update(
    y: Float[Array, " N D"],
    r: Float[Array, " N D"],
    finite_transitions: Bool[Array, " N"],
    d: Float[Array, " N D"],
    largest: Float[Array, ""],
) -> tuple[Float[Array, " N D"], Bool[Array, " N"]]:
    """`y + d` where that makes sense, and the leading steps where it does.

    All other states are set to the last of the leading ones: a new first guess from there on. (To leave them as they were,
    to clip their updates or to take one step from each were measured on ten recurrences from constant guesses: each
    fails on most of them, and this converges on all.)
    """
    stepped = y + d
    sane = jnp.all(jnp.isfinite(stepped) & (jnp.abs(d) <= largest), axis=1)
    num_applied = num_leading_true(sane)
    applied = jnp.arange(y.shape[0]) < num_applied
    # From a state out of which the step is not finite nothing can be learned either.
    usable = finite_transitions & jnp.all(jnp.isfinite(r), axis=1)
    usable = with_row(shift(usable, -1), -1, True)
    last = jnp.where(num_applied == 0, y[0], row_at(stepped, jnp.maximum(num_applied, 1) - 1))
    kept = jnp.where((sane & usable)[:, None], stepped, last)
    return jnp.where(applied[:, None], stepped, kept), applied


def _ravel_steps(y):
    ravel = Ravel(jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), y))
    return jax.vmap(ravel.ravel)(y), ravel


def _check_residual(name, y, f_struct):
    shapes = [x.shape for x in jtu.tree_leaves(y)]
    same = jtu.tree_structure(y) == jtu.tree_structure(f_struct)
    same = same and shapes == [x.shape for x in jtu.tree_leaves(f_struct)]
    if not same or len(shapes) == 0 or any(len(s) == 0 or s[0] != shapes[0][0] or s[0] == 0 for s in shapes):
        raise ValueError(
            f"`{name}` solves residuals of recurrences: `fn(y, args)` must take a pytree of arrays whose leading axis is "
            "the number of steps, at least 1, and return `r[i] = F(y[i-1]) - y[i]` of the same structure and "
            f"shapes. Got `y` of shapes {shapes} and a residual {f_struct}. For a function of one step use "
            "`parallel_diffrax.parallel_scan`."
        )
