"""The base class of all root finders of this package, with what a solve requests of one and what it reports."""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._scan import AbstractScan, AbstractTransitions, AutoScan, check_instance
from ._condensation import StageCondensation
from ._jacobians import AbstractJacobian
from ._monitors import ContractionMonitor, ConvergenceMonitor
from ._ravel import Ravel
from ._recurrence import Recurrence
from ._tolerance import effective_scale, rounding_size, Tolerance


# Beyond this many times the largest number in the guess, an update has left the region in which the linearisation is valid.
_LARGEST_UPDATE = 1e2


class SolveRequest(eqx.Module):
    """What a solve requests of a root finder: `optimistix.root_find(..., options={"request": SolveRequest(...)})`.

    All root finders of this package read it; others ignore it. Without it the defaults hold, and `eps` is that of the
    dtype of the guess.

    **Arguments:**

    - `eps`: the machine epsilon of the states, which may be of lower precision than their raveled vector.
    - `monitor_contraction`: whether Newton's method iterates only on the leading steps on which it contracts, and reports
        their number as `SolveReport.horizon`. Ignored by methods that are not Newton's.
    - `max_growth`, `growth_steps`: under `monitor_contraction`, a limit of the logarithm of the growth of a random
        perturbation over the `growth_steps` leading steps, by default all. If growth exceeds it at the first iterate, the
        solve stops with `nonlinear_divergence`.
    """

    eps: float = eqx.field(static=True)
    monitor_contraction: bool = eqx.field(static=True, default=False)
    max_growth: Float[Array, ""] | None = None
    growth_steps: Int[Array, ""] | None = None


class SolveReport(eqx.Module):
    """What a root finder reports about a solve of `N` steps: `optimistix.Solution.stats["report"]`.

    **Attributes:**

    - `num_converged`: the number of leading steps that have converged.
    - `update`: the largest norm of a step's last update, in units of the tolerance.
    - `horizon`, `predicted_iterations`: the number of leading steps on which Newton's method contracts, and the total number
        of iterations, as predicted after the first. `N` and zero if contraction was not monitored.
    - `rounding_size`: the size of the numbers from which each entry of the states is computed, of the structure of the
        states. Its rounding error is relative to that. `None` if the Jacobians are approximate.
    - `stages`: the inner unknowns of the steps at the solution; `None` if there are none.
    - `growth`: the logarithm of the growth of a random perturbation at the first iterate; `None` without a limit.
    """

    num_converged: Int[Array, ""]
    update: Float[Array, ""]
    horizon: Int[Array, ""]
    predicted_iterations: Int[Array, ""]
    rounding_size: PyTree[Array] | None = None
    stages: Float[Array, " N S D"] | None = None
    growth: Float[Array, ""] | None = None

    @classmethod
    def of(cls, found: optx.Solution, num_steps: int) -> "SolveReport":
        """The report of a solve. A root finder from outside this package makes none, and then no step is reported as
        converged."""
        if "report" in found.stats:
            return found.stats["report"]
        return cls(jnp.array(0), jnp.array(jnp.inf), jnp.array(num_steps), jnp.array(0))


class RootFinderState(eqx.Module):
    """The state between two iterations. `largest` is the largest magnitude of an update; `rounding_size` and `stages` are as
    in `SolveReport`; `contraction` is there only if requested."""

    largest: Float[Array, ""]
    rounding_size: PyTree[Array] | None
    convergence: ConvergenceMonitor
    contraction: ContractionMonitor | None
    stages: Float[Array, " N S D"] | None
    method_state: PyTree[Array]


class AbstractParallelRootFinder(optx.AbstractRootFinder):
    """A root finder that iterates on all steps of a recurrence at once.

    To write one, implement `iterate` and `exact`, and `initial_method_state` if it keeps a state between iterations. It
    reads the `SolveRequest` in `options["request"]`, and leaves a `SolveReport` in `stats["report"]`.
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
        """Makes one iteration.

        **Arguments:** the residual as a function of the states, with its auxiliary output; the residual at `y` and its
        transitions; the states `y`; the test of whether an update is small; the largest magnitude of an update; the state of
        the method.

        **Returns:** the new states, the update, the steps to which it was applied, the new state of the method.
        """

    @property
    @abc.abstractmethod
    def exact(self) -> bool:
        """Whether updates are those of Newton's method."""

    def initial_method_state(self, y: Float[Array, " N D"]) -> PyTree[Array]:
        """The state of the method before the first iteration from the guess `y`. By default none."""
        del y
        return None

    def __check_init__(self):
        name, rtol = type(self).__name__, self.rtol
        for field, value in (("rtol", rtol), ("atol", self.atol)):
            # Written so that NaN fails.
            if isinstance(value, (int, float)) and not value >= 0:
                raise ValueError(f"`{name}({field}={value!r})`: expected a tolerance of at least 0.")
        if isinstance(rtol, (int, float)) and 1 <= rtol < math.inf:
            raise ValueError(f"`{name}(rtol={rtol!r})`: a relative tolerance of 1 or more accepts anything.")
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
        request = _request_of(options, ravel)
        contraction = None
        if self.exact and request.monitor_contraction:
            contraction = ContractionMonitor.start(ys.shape[0], ys.dtype, request.max_growth is not None)
        return RootFinderState(
            largest=largest_update(ys),
            rounding_size=y if self.jacobian.exact else None,
            convergence=ConvergenceMonitor.start(ys.shape[0], ys.dtype),
            contraction=contraction,
            stages=args.guess_stages(ys) if isinstance(args, Recurrence) else None,
            method_state=self.initial_method_state(ys),
        )

    def step(self, fn, y, args, options, state, tags):
        del tags
        ys, ravel = _ravel_steps(y)
        request = _request_of(options, ravel)
        tolerance = Tolerance(self.rtol, self.atol, self.norm, request.eps)

        def plain(ys):
            r, aux = fn(jax.vmap(ravel.unravel)(ys), args)
            return jax.vmap(ravel.ravel)(r), aux

        stages = None if state.stages is None else StageCondensation.at(args, ys, state.stages)
        linear, residual = (plain, plain) if stages is None else (stages.linear, stages.residual)
        r, transitions, aux = self.jacobian.linearise(linear, ys)
        method = (tolerance, state.largest, state.method_state)
        new_ys, d, applied, method_state = self.iterate(residual, r, transitions, ys, *method)
        scale = tolerance.scale(new_ys)
        # An approximate Jacobian does not tell which components a step mixes. For large states memory matters too.
        size = rounding_size(transitions, scale) if self.jacobian.exact else scale
        scale = effective_scale(scale, size)
        contraction = state.contraction
        if contraction is not None:
            # An update that is rounding need not fall.
            at_rounding = tolerance.at_rounding(r, size) & tolerance.resolved(d, scale, size)
            significant = jnp.where(tolerance.noise(d, size), 0, d)
            limit = (request.max_growth, ys.shape[0] if request.growth_steps is None else request.growth_steps)
            contraction = contraction.after(transitions, significant, applied, at_rounding, tolerance, scale, *limit)
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
            # A solve of the leading steps only is a failure: the caller continues from the horizon with a better guess.
            short = state.contraction.horizon < jtu.tree_leaves(y)[0].shape[0]
            failed = failed | state.contraction.growth_exceeded | (terminate & short)
            terminate = terminate | state.contraction.growth_exceeded
        result = optx.RESULTS.where(failed, optx.RESULTS.nonlinear_divergence, optx.RESULTS.successful)
        return terminate, result

    def postprocess(self, fn, y, aux, args, options, state, tags, result) -> tuple[PyTree, PyTree, dict[str, Any]]:
        convergence, contraction = state.convergence, state.contraction
        num_steps = jtu.tree_leaves(y)[0].shape[0]
        report = SolveReport(
            num_converged=convergence.num_converged,
            update=convergence.update,
            horizon=jnp.array(num_steps) if contraction is None else contraction.horizon,
            predicted_iterations=jnp.array(0) if contraction is None else contraction.predicted,
            rounding_size=state.rounding_size,
            stages=state.stages,
            growth=None if contraction is None else contraction.growth,
        )
        return y, aux, {"report": report}


def largest_update(guess: Float[Array, " N D"]) -> Float[Array, ""]:
    """The largest magnitude of an entry of an update. A guess of zeros does not tell the size of the solution."""
    largest = jnp.max(jnp.abs(guess))
    return _LARGEST_UPDATE * jnp.where(largest > 0, largest, jnp.inf)


def scan_of(root_finder: optx.AbstractRootFinder) -> AbstractScan:
    """The scan of a root finder; the default scan if it is not of this package."""
    return getattr(root_finder, "scan", AutoScan())


def _request_of(options, ravel: Ravel) -> SolveRequest:
    return options.get("request", SolveRequest(eps=ravel.eps))


def _ravel_steps(y):
    ravel = Ravel(jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), y))
    return jax.vmap(ravel.ravel)(y), ravel


def _check_residual(name, y, f_struct):
    shapes, got = ([x.shape for x in jtu.tree_leaves(tree)] for tree in (y, f_struct))
    same = jtu.tree_structure(y) == jtu.tree_structure(f_struct) and shapes == got
    if not same or len(shapes) == 0 or any(len(s) == 0 or s[0] != shapes[0][0] or s[0] == 0 for s in shapes):
        raise ValueError(
            f"`{name}` solves residuals of recurrences: `fn(y, args)` must take a pytree of arrays whose leading axis is "
            "the number of steps, at least 1, and return `r[i] = F(y[i-1]) - y[i]` of the same structure and "
            f"shapes. Got `y` of shapes {shapes} and a residual {f_struct}. For a function of one step use "
            "`parallel_diffrax.parallel_scan`."
        )
