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
    orthonormalise,
    products,
    ScaledProduct,
)
from ._implicit_derivative import stop_gradient
from ._newton import ParallelNewton
from ._parallel_scan import check_carry, check_guess, check_kinds, check_length, GivenGuess, stack
from ._policy import AbstractPolicy, AdaptivePolicy
from ._recurrence import Recurrence
from ._solve import RecurrenceSolution, solve_recurrence


# The Jacobians of so many steps are in memory at a time, or of fewer if these are more numbers.
_LARGEST_PART = 2**14
_LARGEST_JACOBIANS = 2**23


class LyapunovEstimate(eqx.Module):
    """Lyapunov exponents over a finite time.

    **Attributes:**

    - `exponent`: the largest: the mean slope of `growth` after the transient. Per unit of time; of a recurrence, per step.
    - `ts`: the ends of the steps, shape `(N,)`.
    - `growth`: the logarithm of the factor by which a random perturbation of the initial state has grown by then, in the
        root mean square over all directions, `log(|A[k] ... A[0]|_F / sqrt(D))`, shape `(N,)`.
    - `spectrum`: the `K` largest exponents in falling order, by a QR factorisation along the trajectory; `None` if they
        were not asked for.
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

    As `lyapunov_exponent`, which see, for the steps of `jax.lax.scan(f, init, xs, length)`.

    **Arguments:**

    - `f`, `init`, `xs`, `length`, `root_finder`, `guess`, `max_steps`, `fallback`, `throw`: as of `parallel_scan`.
    - `transient`, `num_exponents`, `scan`: as of `lyapunov_exponent`; `transient` is a share of the steps.

    **Returns:** a `LyapunovEstimate`, whose `ts` are `1, 2, ..., N`.

    **Raises:** as `parallel_scan`; `ValueError` for a `transient` or `num_exponents` out of range.
    """
    init = jtu.tree_map(jnp.asarray, init)
    check_kinds("scan_lyapunov_exponent", root_finder, policy, max_steps)
    num_steps = check_length(xs, length)
    check_carry(f, init, xs)
    guess = check_guess(guess, init, num_steps)
    recurrence, ravel, y = stack(f, init, jtu.tree_map(jnp.asarray, xs), num_steps, guess)
    check_estimate("scan_lyapunov_exponent", num_steps, ravel.size, transient, num_exponents)
    recurrence = stop_gradient(recurrence)
    solution = solve_recurrence(
        recurrence,
        GivenGuess(stop_gradient(y)),
        root_finder=root_finder,
        max_steps=max_steps,
        policy=policy,
        eps=ravel.eps,
    )
    ts = jnp.arange(1, num_steps + 1, dtype=ravel.dtype)
    return estimate(recurrence, solution, ravel.unravel, 0.0, ts, transient, num_exponents, scan, throw)


def check_estimate(name: str, num_steps: int, size: int, transient, num_exponents):
    """Raises for arguments out of range."""
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
    """Exponents along a solution.

    **Arguments:** the recurrence; its solution; what makes a state of a vector; the time before the first step; the ends of
    the steps; the share of steps that do not count; how many exponents of the spectrum; how products are evaluated;
    whether to raise if the solve failed.
    """
    y, failed = lax.stop_gradient(solution.y), solution.result != optx.RESULTS.successful
    if throw:
        y = solution.result.error_if(y, failed)
    y = jnp.where(failed, jnp.nan, y)
    num_steps, size = y.shape
    part = min(num_steps, _LARGEST_PART, max(64, _LARGEST_JACOBIANS // size**2))
    count = -(-num_steps // part)

    def cut(x):
        # The last part repeats the last step, whose Jacobian is then replaced by the identity.
        index = jnp.minimum(jnp.arange(count * part), num_steps - 1)
        return x[index].reshape(count, part, *x.shape[1:])

    def body(carry, element):
        product, frame = carry
        previous, inputs, counts = element
        A = jax.vmap(jax.jacfwd(recurrence.step))(previous, inputs)
        A = jnp.where(counts[:, None, None], A, jnp.eye(size, dtype=A.dtype))
        after = compose(product, products(DenseTransitions(A), scan))
        frame, logs = frame_growth(A, frame) if num_exponents > 0 else (frame, None)
        return (ScaledProduct(after.P[-1], after.exponent[-1]), frame), (after.log_growth(), logs)

    frame = _random_frame(size, num_exponents, y.dtype)
    elements = jtu.tree_map(cut, (recurrence.previous(y), recurrence.inputs))
    counts = (jnp.arange(count * part) < num_steps).reshape(count, part)
    _, (growth, logs) = lax.scan(body, (ScaledProduct.identity(size, y.dtype), frame), (*elements, counts))
    growth = growth.reshape(-1)[:num_steps]

    # The last step of the transient, counted from one; with none, growth is from nothing.
    skipped = jnp.floor(jnp.asarray(transient) * num_steps).astype(int)
    start = jnp.where(skipped > 0, ts[jnp.maximum(skipped - 1, 0)], t0)
    duration = jnp.abs(ts[-1] - start)
    before = jnp.where(skipped > 0, growth[jnp.maximum(skipped - 1, 0)], 0)
    exponent = (growth[-1] - before) / duration.astype(y.dtype)

    spectrum = None if logs is None else _spectrum(logs, part, skipped, t0, ts)
    return LyapunovEstimate(exponent, ts, growth, spectrum, unravel(y[-1]))


def _random_frame(size: int, num_exponents: int, dtype) -> Float[Array, "D K"]:
    if num_exponents == 0:
        return jnp.zeros((size, 0), dtype)
    return orthonormalise(jax.random.normal(jax.random.key(0), (size, num_exponents), dtype))[0]


def _spectrum(
    logs: Float[Array, "parts blocks K"], part: int, skipped: Int[Array, ""], t0, ts: Float[Array, " N"]
) -> Float[Array, " K"]:
    """The mean slopes of the logarithms of the segments of each block of steps, from the block on that the transient ends
    in."""
    begins = (jnp.arange(logs.shape[0])[:, None] * part + jnp.arange(logs.shape[1]) * FRAME_BLOCK).reshape(-1)
    included = begins > skipped - FRAME_BLOCK
    first = jnp.min(jnp.where(included, begins, ts.shape[0] - 1))
    start = jnp.where(first > 0, ts[jnp.maximum(first - 1, 0)], t0)
    total = jnp.sum(jnp.where(included[:, None], logs.reshape(included.size, -1), 0), axis=0)
    return -jnp.sort(-total / jnp.abs(ts[-1] - start).astype(total.dtype))
