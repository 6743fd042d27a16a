"""All scans of a linear recurrence agree with a loop, forwards and transposed, and so do their derivatives."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from parallel_diffrax._scan import (
    AssociativeScan,
    AutoScan,
    BidiagonalSolver,
    BlockDiagonalTransitions,
    BlockedScan,
    DenseTransitions,
    DiagonalTransitions,
    KoggeStoneScan,
    ScalarTransitions,
    SequentialScan,
    solve_bidiagonal,
    ZeroTransitions,
)
from parallel_diffrax._scan._shifts import shift


SCANS = [
    SequentialScan(),
    AssociativeScan(),
    KoggeStoneScan(),
    BlockedScan(radix=3, num_carries=4),
    BlockedScan(),
    AutoScan(),
]
SHAPES = [(1, 1), (2, 3), (13, 1), (37, 2), (16, 9)]


def make(num_steps, size, kind, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    r = jnp.asarray(rng.normal(size=(num_steps, size)), dtype)
    if kind == "dense":
        A = rng.normal(size=(num_steps, size, size)) / np.sqrt(size)
        return DenseTransitions(jnp.asarray(A, dtype)), r
    if kind == "blocks":
        groups = tuple(map(tuple, rng.permutation(size).reshape(-1, 1 + (size % 2 == 0))))
        A = rng.normal(size=(num_steps, *np.shape(groups), np.shape(groups)[1]))
        return BlockDiagonalTransitions(jnp.asarray(A, dtype), tuple(tuple(map(int, g)) for g in groups)), r
    if kind == "scalar":
        return ScalarTransitions(jnp.asarray(rng.normal(size=num_steps), dtype), size), r
    if kind == "zero":
        return ZeroTransitions(num_steps, size, np.dtype(dtype)), r
    return DiagonalTransitions(jnp.asarray(rng.normal(size=(num_steps, size)), dtype)), r


def loop(A, r, transpose):
    A, r = np.asarray(A, np.float64), np.asarray(r, np.float64)
    num_steps = len(r)
    out = np.zeros_like(r)
    previous = np.zeros(r.shape[1])
    if transpose:
        for i in reversed(range(num_steps)):
            previous = r[i] + (A[i + 1].T @ previous if i + 1 < num_steps else 0)
            out[i] = previous
    else:
        for i in range(num_steps):
            previous = r[i] + (A[i] @ previous if i > 0 else 0)
            out[i] = previous
    return out


def both_ways(scan):
    """Solves a recurrence and its transpose in one program."""
    return jax.jit(lambda transitions, r: [scan.solve(transitions, r, transpose=way) for way in (False, True)])


@pytest.mark.parametrize("scan", SCANS[:4], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", ["dense", "diagonal", "blocks", "scalar", "zero"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_scan_solves_the_recurrence_and_its_transpose(scan, kind, dtype):
    for num_steps, size in SHAPES if kind in ("dense", "diagonal") else [(13, 4)]:
        transitions, r = make(num_steps, size, kind, dtype)
        for transpose, got in enumerate(both_ways(scan)(transitions, r)):
            want = loop(transitions.dense(), r, transpose)
            assert got.dtype == dtype
            tolerance = 100 * np.finfo(dtype).eps * max(1.0, np.max(np.abs(want)))
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scan", SCANS[1:5], ids=lambda s: f"{type(s).__name__}{getattr(s, 'radix', '')}")
@pytest.mark.parametrize("reverse", [False, True])
def test_prefix_products_are_in_order_for_every_length(scan, reverse):
    # Strings of digits do not commute: (number, power of ten).
    def compose(first, then):
        return first[0] * then[1] + then[0], first[1] * then[1]

    for num_steps in (1, 2, 7, 12, 15):
        digits = jnp.arange(1, num_steps + 1) % 10
        got, _ = jax.jit(lambda x, scan=scan: scan.prefix(compose, (x, jnp.full_like(x, 10)), reverse=reverse))(digits)
        text = "".join(str(int(d)) for d in digits)
        want = [int(text[i:][::-1] if reverse else text[: i + 1]) for i in range(num_steps)]
        np.testing.assert_array_equal(got, want)


def test_the_first_transition_is_never_read():
    transitions, r = make(11, 2, "dense")
    poisoned = DenseTransitions(transitions.A.at[0].set(jnp.nan))
    for scan in SCANS:
        solve = both_ways(scan)
        np.testing.assert_array_equal(solve(poisoned, r), solve(transitions, r))


def test_a_non_finite_value_reaches_all_later_steps_and_no_earlier_one():
    transitions, r = make(20, 2, "dense")
    for scan in SCANS:
        d = np.asarray(jax.jit(scan.solve)(transitions, r.at[8, 0].set(jnp.nan)))
        assert np.isfinite(d[:8]).all()
        assert not np.isfinite(d[8:]).all(axis=1).any()


@pytest.mark.parametrize("kind", ["dense", "diagonal"])
def test_masking_zeroes_non_finite_transitions(kind):
    transitions, _ = make(6, 2, kind)
    broken = jax.tree.map(lambda a: a.at[2].set(jnp.inf), transitions)
    mask = broken.finite()
    assert mask.tolist() == [True, True, False, True, True, True]
    assert np.isfinite(broken.where(mask).dense()).all()
    np.testing.assert_array_equal(broken.where(mask).dense()[3:], transitions.dense()[3:])


def bidiagonal_matrix(A) -> np.ndarray:
    """`L` of the recurrence `d[i] = A[i] d[i-1] + r[i]`, written out."""
    num_steps, size, _ = A.shape
    L = np.eye(num_steps * size)
    for i in range(1, num_steps):
        L[i * size : (i + 1) * size, (i - 1) * size : i * size] = -A[i]
    return L


def jacobian_of_a_residual(transitions, r):
    """`-L` as an operator of lineax that knows nothing of its structure."""
    return lx.FunctionLinearOperator(lambda d: transitions.apply(shift(d)) - d, jax.ShapeDtypeStruct(r.shape, r.dtype))


@pytest.mark.parametrize("kind", ["dense", "diagonal"])
def test_the_solver_solves_the_matrix_and_its_transpose(kind):
    transitions, r = make(9, 3, kind)
    operator, L = jacobian_of_a_residual(transitions, r), bidiagonal_matrix(np.asarray(transitions.dense()))
    np.testing.assert_allclose(np.asarray(operator.mv(r)).ravel(), -L @ np.asarray(r).ravel(), atol=1e-13)
    got, transpose = jax.vjp(lambda r: lx.linear_solve(operator, r, BidiagonalSolver()).value, r)
    for solution, matrix in ((got, -L), (transpose(r)[0], -L.T)):
        want = np.linalg.solve(matrix, np.asarray(r).ravel())
        np.testing.assert_allclose(np.asarray(solution).ravel(), want, atol=1e-11)


def solve_by_loop(A, r):
    """Ordinary differentiable code: the reference for all derivatives."""
    d = [r[0]]
    for i in range(1, r.shape[0]):
        d.append(A[i] @ d[-1] + r[i])
    return jnp.stack(d)


def through_function(A, r):
    return solve_bidiagonal(DenseTransitions(A), r)


def through_lineax(A, r):
    return -lx.linear_solve(jacobian_of_a_residual(DenseTransitions(A), r), r, BidiagonalSolver()).value


@pytest.mark.parametrize("solve", [through_function, through_lineax])
def test_derivatives_of_the_solution_equal_a_loops_derivatives(solve):
    transitions, r = make(6, 2, "dense")
    args, tangents = (transitions.A, r), tuple(make(6, 2, "dense", seed=1)[k] for k in (0, 1))
    tangents = (tangents[0].A, tangents[1])

    def loss(solve):
        return lambda A, r: jnp.sum(jnp.sin(solve(A, r)))

    def derivatives(solve):
        """Forward mode, reverse mode, and second order."""
        return (
            jax.jvp(solve, args, tangents),
            jax.grad(loss(solve), argnums=(0, 1))(*args),
            jax.hessian(loss(solve), argnums=1)(*args),
        )

    got, want = (jax.jit(lambda s=s: derivatives(s))() for s in (solve, solve_by_loop))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-12)


def test_a_non_finite_cotangent_is_passed_on_and_not_raised():
    transitions, r = make(6, 2, "dense")
    gradient = jax.grad(lambda r: jnp.sqrt(-1.0) * jnp.sum(solve_bidiagonal(transitions, r) ** 2))(r)
    assert np.isnan(gradient).any()


def test_the_solver_finds_the_blocks_of_any_operator_that_is_a_residual_jacobian():
    transitions, r = make(7, 3, "dense")
    got = lx.linear_solve(jacobian_of_a_residual(transitions, r), r, BidiagonalSolver()).value
    np.testing.assert_allclose(got, -solve_bidiagonal(transitions, r), atol=1e-12)
    with pytest.raises(ValueError, match="one array of shape"):
        lx.linear_solve(lx.IdentityLinearOperator({"a": r}) * 2.0, {"a": r}, BidiagonalSolver())
