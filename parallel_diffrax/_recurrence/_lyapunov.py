"""How fast perturbations grow along a trajectory."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from .._scan import (
    AbstractScan,
    AutoScan,
    check_integer,
    compose,
    DenseTransitions,
    FRAME_BLOCK,
    frame_growth,
    join_segments,
    orthonormalise,
    products,
    ScaledProduct,
)
from ._newton import ParallelNewton
from ._policies import AbstractPolicy, AdaptivePolicy
from ._recurrence import Recurrence
from ._scan_problem import ScanProblem
from ._solution import RecurrenceSolution
from ._solve import check_kinds
from ._tangents import stop_gradient


# Largest number of steps whose Jacobians are in memory at a time, and of the entries of these Jacobians.
_LARGEST_PART = 2**14
_LARGEST_JACOBIANS = 2**23


class LyapunovEstimate(eqx.Module):
    """Lyapunov exponents over a finite time, of a state of `D` numbers.

    **Attributes:**

    - `exponent`: the largest exponent: the mean slope of `growth` after the transient, per unit of time. For a recurrence,
        per step.
    - `ts`: the ends of the steps, shape `(N,)`.
    - `growth`: the logarithm of the factor by which a random perturbation of the initial state has grown at `ts`, in the
        root mean square over all directions: `log(|A[k] ... A[0]|_F / sqrt(D))`, shape `(N,)`.
    - `spectrum`: the `K` largest exponents in descending order, by a QR factorisation along the trajectory; `None` unless
        requested.
    - `y`: the last state.
    """

    exponent: Float[Array, ""]
    ts: Float[Array, " N"]
    growth: Float[Array, " N"]
    spectrum: Float[Array, " K"] | None
    y: PyTree[Array]


@eqx.filter_jit
def scan_lyapunov_exponent(
    f: Callable,
    init: PyTree[Array],
    xs: PyTree = None,
    length: int | None = None,
    *,
    transient: float = 0.1,
    num_exponents: int = 0,
    scan: AbstractScan = AutoScan(),
    root_finder: optx.AbstractRootFinder = ParallelNewton(),
    guess: PyTree | None = None,
    max_steps: int = 64,
    policy: AbstractPolicy = AdaptivePolicy(),
    throw: bool = True,
) -> LyapunovEstimate:
    """The largest Lyapunov exponent of a recurrence, per step, from the Jacobians along its trajectory.

    Use it for the steps of `jax.lax.scan(f, init, xs, length)`. For a differential equation there is `lyapunov_exponent`,
    which explains the method.

    **Arguments:** `f`, `init`, `xs`, `length`, `root_finder`, `guess`, `max_steps`, `policy`, `throw`, as for
    `parallel_scan`; `transient`, the share of the steps to ignore at the beginning, at least 0 and less than 1;
    `num_exponents` and `scan`, as for `lyapunov_exponent`.

    **Returns:** a `LyapunovEstimate`, whose `ts` are `1, 2, ..., N`.

    **Cost:** that of `parallel_scan`, and of `lyapunov_exponent` after its solve.

    **Raises:** like `parallel_scan`; `ValueError` for a `transient` or `num_exponents` out of range.
    """
    call = "scan_lyapunov_exponent"
    check_kinds(call, root_finder, policy, max_steps)
    problem = stop_gradient(ScanProblem.make(call, f, init, xs, length, guess))
    check_estimate(call, problem.length, problem.ravel.size, transient, num_exponents)
    solution = problem.solve(root_finder, max_steps, policy)
    ts = jnp.arange(1, problem.length + 1, dtype=problem.ravel.dtype)
    return estimate(problem.recurrence, solution, problem.ravel.unravel, 0.0, ts, transient, num_exponents, scan, throw)


def check_estimate(name: str, num_steps: int, size: int, transient, num_exponents):
    """Raises `ValueError` unless an estimate is possible for `num_steps` steps of a state of `size` numbers."""
    if num_steps < 1 or size < 1:
        raise ValueError(f"`{name}(...)`: expected at least one step of at least one number.")
    if isinstance(transient, (int, float)) and not 0 <= transient < 1:
        raise ValueError(f"`{name}(transient={transient!r})`: expected a share of at least 0 and less than 1.")
    check_integer(name, "num_exponents", num_exponents, "the number of exponents of the spectrum", least=0)
    if num_exponents > size:
        raise ValueError(
            f"`{name}(num_exponents={num_exponents!r})`: expected at most {size}, the number of entries of the state."
        )


def estimate(
    recurrence: Recurrence,
    solution: RecurrenceSolution,
    unravel: Callable,
    t0: Float[ArrayLike, ""],
    ts: Float[Array, " N"],
    transient: float | Float[Array, ""],
    num_exponents: int,
    scan: AbstractScan,
    throw: bool,
) -> LyapunovEstimate:
    """The exponents along a solution, for steps that start at time `t0` and end at `ts`. `unravel` converts a vector to a
    state. If the solve failed, it raises if `throw`, and otherwise the exponents are NaN."""
    y, failed = lax.stop_gradient(solution.y), solution.result != optx.RESULTS.successful
    if throw:
        y = solution.result.error_if(y, failed)
    y = jnp.where(failed, jnp.nan, y)
    num_steps, size = y.shape
    part = min(num_steps, _LARGEST_PART, max(64, _LARGEST_JACOBIANS // size**2))
    count = -(-num_steps // part)

    def cut(x):
        # Copies of the last step pad the last part. Their Jacobians are replaced by the identity.
        index = jnp.minimum(jnp.arange(count * part), num_steps - 1)
        return x[index].reshape(count, part, *x.shape[1:])

    def body(carry, element):
        product, frame = carry
        previous, inputs, counts = element
        A = jax.vmap(jax.jacfwd(recurrence.step))(previous, inputs)
        A = jnp.where(counts[:, None, None], A, jnp.eye(size, dtype=A.dtype)[None])
        after = compose(product, products(DenseTransitions(A), scan))
        frame, logs = frame_growth(A, frame) if num_exponents > 0 else (frame, None)
        return (ScaledProduct(after.P[-1], after.exponent[-1]), frame), (after.log_growth(), logs)

    frame = jnp.zeros((size, 0), y.dtype)
    if num_exponents > 0:
        frame, _ = orthonormalise(jax.random.normal(jax.random.key(0), (size, num_exponents), y.dtype))
    elements = jtu.tree_map(cut, (recurrence.previous(y), recurrence.inputs))
    counts = (jnp.arange(count * part) < num_steps).reshape(count, part)
    _, (growth, logs) = lax.scan(body, (ScaledProduct.identity(size, y.dtype), frame), (*elements, counts))
    growth = join_segments(growth, num_steps)

    # Growth starts after the last step of the transient, or at `t0` if there is none.
    t0 = jnp.asarray(t0, ts.dtype)
    skipped = jnp.floor(jnp.asarray(transient) * num_steps).astype(int)
    start = jnp.where(skipped > 0, ts[jnp.maximum(skipped - 1, 0)], t0)
    before = jnp.where(skipped > 0, growth[jnp.maximum(skipped - 1, 0)], 0)
    exponent = (growth[-1] - before) / jnp.abs(ts[-1] - start).astype(y.dtype)
    spectrum = None if logs is None else _spectrum(logs, part, skipped, t0, ts)
    return LyapunovEstimate(exponent, ts, growth, spectrum, unravel(y[-1]))


def _spectrum(
    logs: Float[Array, "P M K"], part: int, skipped: Int[Array, ""], t0: Float[Array, ""], ts: Float[Array, " N"]
) -> Float[Array, " K"]:
    """The mean slopes of the logarithms of the growth over each block of steps, from the block on in which the transient
    ends."""
    begins = (jnp.arange(logs.shape[0])[:, None] * part + jnp.arange(logs.shape[1])[None] * FRAME_BLOCK).reshape(-1)
    included = begins > skipped - FRAME_BLOCK
    first = jnp.min(jnp.where(included, begins, ts.shape[0] - 1))
    start = jnp.where(first > 0, ts[jnp.maximum(first - 1, 0)], t0)
    total = jnp.sum(jnp.where(included[:, None], logs.reshape(included.size, -1), 0), axis=0)
    return -jnp.sort(-total / jnp.abs(ts[-1] - start).astype(total.dtype))
