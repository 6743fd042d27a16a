"""The kernels of a linear recurrence agree with a loop, thread by thread (emulated in NumPy), and lower for a GPU. Other
scans evaluate what the kernels do not support.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx
from parallel_diffrax._kernels import _linear_recurrence, _mosaic, _probe, _warp
from parallel_diffrax._scan import (
    _kernel_scan,
    DenseTransitions,
    DiagonalTransitions,
    ScalarTransitions,
    solve_bidiagonal,
)

from . import emulated_threads
from .test_stepper import launch_by_warp


def use(monkeypatch, launch):
    """Solves recurrences by kernels that `launch` runs."""
    monkeypatch.setattr(_linear_recurrence, "backend", lambda test, *kernels: launch)


@pytest.fixture
def emulated(monkeypatch):
    use(monkeypatch, emulated_threads.launch)


def make(shape, size, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    A = 0.7 * rng.normal(size=(*shape, size, size)) / np.sqrt(size)
    return A.astype(dtype), rng.normal(size=(*shape, size)).astype(dtype)


def loop(A, r, reverse):
    """The recurrence over the first axis. The other axes are batch axes."""
    A, r = A.astype(np.float64), r.astype(np.float64)
    order = range(len(r))[::-1] if reverse else range(len(r))
    out, before = np.zeros_like(r), None
    for i in order:
        before = r[i] if before is None else np.einsum("...jk,...k->...j", A[i], before) + r[i]
        out[i] = before
    return out


def solve(A, r, reverse=False):
    transitions = DenseTransitions(jnp.asarray(A))
    return _kernel_scan.solve_in_kernels(
        transitions, jnp.asarray(r), reverse=reverse, otherwise=pdx.scans.SequentialScan()
    )


def close(got, want, dtype):
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=50 * np.finfo(dtype).eps * max(1.0, np.abs(want).max()))


# One step; one segment; a ragged last segment; two and three levels; several blocks.
SHAPES = [((1,), 2), ((5,), 1), ((32,), 3), ((75,), 3), ((64, 2), 4), ((50, 3), 5), ((1100,), 2), ((300,), 16)]


@pytest.mark.parametrize("many", [2**14, 1], ids=["lanes", "columns"])
def test_segments_in_threads_are_the_recurrence_in_both_directions(emulated, monkeypatch, many):
    # With many segments, a thread computes several columns of a product, or all rows of a step.
    monkeypatch.setattr(_linear_recurrence, "_MANY_SEGMENTS", many)
    for shape, size in SHAPES:
        A, r = make(shape, size)
        for reverse in (False, True):
            A[-1 if reverse else 0] = np.nan  # never used
            close(solve(A, r, reverse), loop(A, r, reverse), np.float64)
            A[-1 if reverse else 0] = 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_segments_by_warp_on_a_cpu_are_the_recurrence(monkeypatch, dtype):
    use(monkeypatch, launch_by_warp())
    # Threads on a CPU cannot exchange numbers.
    monkeypatch.setattr(_linear_recurrence._Level, "lanes", 1)
    for shape, size in (((75,), 3), ((64, 2), 4)):
        A, r = make(shape, size, dtype)
        close(solve(A, r, reverse=True), loop(A, r, True), dtype)


def test_kernels_work_in_single_precision_and_on_diagonals(emulated):
    A, r = make((80, 3), 1, np.float32)
    transitions, b = DiagonalTransitions(jnp.asarray(A[..., 0, 0])), jnp.asarray(r[..., 0])
    got = _kernel_scan.solve_in_kernels(transitions, b, reverse=False, otherwise=pdx.scans.SequentialScan())
    assert got.dtype == np.float32
    close(got, loop(A, r, False)[..., 0], np.float32)


def test_a_non_finite_value_reaches_all_later_steps_and_no_earlier_one(emulated):
    A, r = make((200,), 2)
    r[90, 1] = np.inf
    d = np.asarray(solve(A, r))
    assert np.isfinite(d[:90]).all() and not np.isfinite(d[90:]).all(axis=1).any()


def test_a_batch_adds_threads_and_shares_its_common_matrices(emulated, monkeypatch):
    seen = []

    def launch(program, operands, *rest):
        seen.append(operands[0].shape)
        return emulated_threads.launch(program, operands, *rest)

    use(monkeypatch, launch)
    A, r = make((3, 40), 2)
    more = np.stack([r, 2 * r, r - 1, 3 - r])
    wanted = np.stack([[loop(A[m], x[m], False) for m in range(3)] for x in more])
    shared, each = (None, 0), (0, 0)
    for vmapped, A_given, r_given, want, num_sets in (
        (jax.vmap(solve), A, r, wanted[0], 3),
        (jax.vmap(solve, (0, None)), A, r[0], [loop(A[m], r[0], False) for m in range(3)], 3),
        (jax.vmap(solve, shared), A[0], more[:, 0], wanted[:, 0], 1),
        (jax.vmap(jax.vmap(solve, each), shared), A, more, wanted, 3),
        (jax.vmap(jax.vmap(solve, shared), each), A, np.swapaxes(more, 0, 1), np.swapaxes(wanted, 0, 1), 3),
    ):
        close(vmapped(A_given, r_given), want, np.float64)
        # The first level, as it was traced last.
        assert [shape for shape in seen if shape[1] == 40][-1] == (num_sets, 40, 1, 2, 2)


def test_another_scan_evaluates_a_batch_that_may_be_spread_over_devices(monkeypatch):
    def launch(*args):
        outputs = args[2]
        return [jnp.full(x.shape, jnp.nan, x.dtype) for x in outputs]

    use(monkeypatch, launch)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    A, r = make((3, 40), 2)
    more = np.stack([r, 2 * r])
    got = jax.vmap(jax.vmap(solve), (None, 0))(A, more)
    close(got, [[loop(A[m], x[m], False) for m in range(3)] for x in more], np.float64)
    # Without a batch, kernels are used, here broken ones.
    assert np.isnan(solve(A[0], r[0])).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_level_is_two_kernels_that_lower_for_a_gpu(monkeypatch, dtype):
    use(monkeypatch, _mosaic.launch)
    # Two to four levels, of small and of large matrices.
    for num_steps, size, levels in ((40000, 2, 4), (1000, 3, 2), (600, 16, 3)):
        A, r = jnp.zeros((num_steps, size, size), dtype), jnp.zeros((num_steps, size), dtype)
        backwards = jax.jit(functools.partial(solve, reverse=True))
        text = backwards.trace(A, r).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu") == 2 * levels - 1


def test_every_kernel_of_a_scan_compiles_by_warp_for_older_gpus(monkeypatch, tmp_path):
    launch_by_warp()
    import warp

    seen = []

    def launch(program, operands, outputs, num_threads, group, name):
        dtypes = tuple(np.dtype(x.dtype) for x in (*operands, *outputs))
        seen.append(_warp.build(_warp.source(program, dtypes, num_threads, group), dtypes, f"{name}_{len(seen)}"))
        return [jnp.zeros(x.shape, x.dtype) for x in outputs]

    use(monkeypatch, launch)
    solve(*make((75,), 3))
    assert len(seen) == 3
    for kernel in seen:
        warp.compile_aot_module(kernel.module, arch=[80, 89], module_dir=tmp_path, use_ptx=True)
    texts = [file.read_bytes() for file in tmp_path.glob("*.ptx")]
    assert len(texts) == 6 and sum(b"shfl.sync" in text for text in texts) == 4
    assert sum(b".target sm_80" in text for text in texts) == sum(b".target sm_89" in text for text in texts) == 3


def test_derivatives_of_a_kernel_scan_equal_derivatives_of_other_scans(emulated, monkeypatch):
    monkeypatch.setattr(_kernel_scan, "scan_kernels_work", lambda: True)
    A, r = map(jnp.asarray, make((70,), 2))

    def loss(A, r, scan, solve):
        return jnp.sum(jnp.sin(solve(scan, A, r)))

    ways = {
        "directly": lambda scan, A, r: scan.solve(DenseTransitions(A), r),
        "implicitly": lambda scan, A, r: solve_bidiagonal(DenseTransitions(A), r, scan),
        "transposed": lambda scan, A, r: scan.solve(DenseTransitions(A), r, transpose=True),
    }
    for solve in ways.values():
        got, want = (
            jax.jit(jax.value_and_grad(functools.partial(loss, scan=scan, solve=solve), (0, 1)))(A, r)
            for scan in (pdx.scans.KernelScan(), pdx.scans.SequentialScan())
        )
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got, want)


def test_another_scan_evaluates_what_kernels_do_not_support(monkeypatch):
    monkeypatch.setattr(_kernel_scan, "scan_kernels_work", lambda: True)
    A, r = map(jnp.asarray, make((40,), 2))
    large, long = map(jnp.asarray, make((40,), _linear_recurrence.LARGEST_SIZE + 1))
    for transitions, b in (
        (DenseTransitions(A.astype(jnp.float16)), r.astype(jnp.float16)),
        (DenseTransitions(A.astype(jnp.float32)), r),
        (DenseTransitions(large), long),
        (ScalarTransitions(A[:, 0, 0], 2), r),
    ):
        # One case mixes dtypes.
        with jax.numpy_dtype_promotion("standard"):
            traced = jax.jit(pdx.scans.KernelScan().solve).trace(transitions, b)
            got = pdx.scans.KernelScan(pdx.scans.SequentialScan()).solve(transitions, b)
            want = pdx.scans.SequentialScan().solve(transitions, b)
        assert "mosaic" not in traced.lower(lowering_platforms=("cuda",)).as_text()
        np.testing.assert_array_equal(got, want)
    with pytest.raises(TypeError):
        pdx.scans.KernelScan(3)  # pyright: ignore[reportArgumentType]


def test_a_device_whose_kernels_fail_uses_another_scan(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such GPU")

    def wrong(program, operands, outputs, *rest):
        return [jnp.ones(x.shape, x.dtype) for x in outputs]

    A, r = map(jnp.asarray, make((40,), 2))
    hopper = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    choose = _probe._choose.__wrapped__
    monkeypatch.setattr(jax, "devices", lambda *args: [hopper])
    for launch in (broken, wrong, emulated_threads.launch):
        monkeypatch.setattr(_probe, "_BACKENDS", (_probe.Backend("mosaic", launch, 9.0),))
        monkeypatch.setattr(_probe, "_choose", choose)
        monkeypatch.setattr(_probe, "_declined", [])
        # (The emulated program is not compiled for a GPU either, so it fails too.)
        with pytest.warns(RuntimeWarning, match="runs no kernels of ours"):
            assert not _linear_recurrence.scan_kernels_work()
        got = pdx.scans.KernelScan(pdx.scans.SequentialScan()).solve(DenseTransitions(A), r)
        np.testing.assert_array_equal(got, pdx.scans.SequentialScan().solve(DenseTransitions(A), r))


def test_the_default_scan_uses_kernels_for_many_steps_and_for_large_states(monkeypatch):
    use(monkeypatch, _mosaic.launch)
    monkeypatch.setattr(_kernel_scan, "scan_kernels_work", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for num_steps, size, expected in ((4096, 2, 0), (40000, 2, 7), (32, 16, 0), (100, 16, 3), (100, 17, 0)):
        A, r = jnp.zeros((num_steps, size, size)), jnp.zeros((num_steps, size))
        solve = jax.jit(lambda A, r: pdx.scans.AutoScan().solve(DenseTransitions(A), r))
        text = solve.trace(A, r).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu") == expected
