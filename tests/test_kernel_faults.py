"""Whatever fails in a kernel, the answer is right or the result says that it is not; and kernels can be switched off."""

import functools
import sys
import types
import warnings

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx
from parallel_diffrax._kernels import _batches, _loop, _mosaic, _probe, _warp
from parallel_diffrax._recurrence import _stepper

from . import emulated_threads
from .problems import parallel_solver
from .test_stepper import launch_by_warp


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, as far as the library can tell, without Warp."""
    hopper = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda *args: [hopper])
    monkeypatch.setattr(_probe, "_choose", functools.cache(_probe._choose.__wrapped__))
    monkeypatch.setattr(_probe, "_declined", [])
    monkeypatch.setattr(_probe, "installed", lambda package: False)
    for module in (_loop, _stepper):
        monkeypatch.setattr(module, "on_cpu", lambda *kernels: False)

    def on_cuda(*args, default=None, **branches):
        return branches.get("cuda", default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_cuda)
    # What was traced for another device must not be found again.
    jax.clear_caches()
    yield hopper
    jax.clear_caches()


def works(launch):
    return True


def use(monkeypatch, launch):
    """Runs loops in kernels of this backend alone, which passes its test and need not be lowered."""
    monkeypatch.setattr(_probe, "_BACKENDS", (_probe.Backend("mosaic", launch, 9.0),))
    monkeypatch.setattr(_loop, "passes_common_test", works)
    monkeypatch.setattr(_loop.KernelLoop, "lower", lambda self, platform: None)


# A problem whose step is cheap to compile.
TERM = dfx.ODETerm(lambda t, y, rate: rate * jnp.stack([-y[1], y[0]]) + 0.1 * jnp.cos(t))


def solve(solver, rates):
    def one(rate):
        solution = dfx.diffeqsolve(TERM, solver, 0.0, 1.0, 1.0, jnp.array([1.0, 0.5]), rate, max_steps=1, throw=False)
        return solution.ys[0], solution.result == dfx.RESULTS.successful

    return jax.jit(jax.vmap(one))(rates)


RATES = jnp.linspace(0.5, 2.0, 3)
SEQUENTIAL = parallel_solver(dfx.Heun(), 24, policy=pdx.policies.Sequential())


@functools.cache
def expected():
    solution = lambda rate: dfx.diffeqsolve(TERM, dfx.Heun(), 0.0, 1.0, 1 / 24, jnp.array([1.0, 0.5]), rate)
    return np.asarray(jax.jit(jax.vmap(solution))(RATES).ys[:, 0])


def wrong_launch(program, operands, outputs, *rest):
    found = emulated_threads.launch(program, operands, outputs, *rest)
    return [x * 1.001 if x.dtype.kind == "f" else x for x in found]


def failing(*args, **kwargs):
    raise RuntimeError("a fault")


def test_a_batch_of_sequential_steps_is_one_kernel(gpu, monkeypatch):
    launched = []

    def launch(program, operands, outputs, num_threads, *rest):
        launched.append(num_threads)
        return emulated_threads.launch(program, operands, outputs, num_threads, *rest)

    use(monkeypatch, launch)
    ys, successful = solve(SEQUENTIAL, RATES)
    assert successful.all() and 3 in launched
    np.testing.assert_allclose(ys, expected(), rtol=1e-13)


FAULTS = ["import", "trace", "lower", "launch", "wrong numbers in the test"]
FULL = pytest.mark.full


@pytest.mark.parametrize(
    "by, fault",
    [
        *(("mosaic", fault) for fault in FAULTS),
        *(pytest.param("warp", fault, marks=FULL if fault in FAULTS[1:3] + FAULTS[4:] else ()) for fault in FAULTS),
    ],
)
def test_a_fault_of_any_kind_means_the_answer_of_xla_and_one_warning(gpu, monkeypatch, fault, by):
    if by == "warp":
        launch_by_warp()
        gpu.compute_capability = "8.0"
        monkeypatch.setattr(_probe, "installed", lambda package: True)
    if fault != "launch":
        # Only some faults show in the test at first use.
        monkeypatch.setattr(_loop, "passes_common_test", works)
    if fault == "import":
        monkeypatch.setitem(sys.modules, {"mosaic": "jax.experimental.pallas", "warp": "warp"}[by], None)
    elif fault == "trace":
        threads = {"mosaic": _mosaic._MosaicThreads, "warp": _warp._WarpThreads}[by]
        monkeypatch.setattr(threads, "arithmetic", failing)
    elif fault == "lower":
        monkeypatch.setattr(_loop.KernelLoop, "lower", failing)
    elif fault == "launch":
        # Nothing here can run what Mosaic lowered for a GPU, so that the test at first use fails when it is compiled.
        monkeypatch.setattr(_warp, "_PRELUDE", "#error")
    else:
        monkeypatch.setattr(_loop, "passes_common_test", lambda launch: False)
    with pytest.warns(RuntimeWarning, match="runs no kernels of ours, since") as caught:
        ys, successful = solve(SEQUENTIAL, RATES)
    assert successful.all()
    np.testing.assert_allclose(ys, expected(), rtol=1e-13)
    assert len([w for w in caught if "no kernels of ours" in str(w.message)]) == 1


@pytest.fixture
def wrong(gpu, monkeypatch):
    """Kernels that pass their test at first use, and then return wrong numbers."""
    use(monkeypatch, wrong_launch)


def test_wrong_numbers_from_a_kernel_are_a_failing_result(wrong):
    _, successful = solve(SEQUENTIAL, RATES)
    assert not successful.any()


def test_one_wrong_step_is_a_failing_result_unless_there_are_too_many_to_check_each(gpu, monkeypatch):
    def launch(program, operands, outputs, *rest):
        # The states of all members, two numbers each, after step 13 of 24.
        found = emulated_threads.launch(program, operands, outputs, *rest)
        return [jnp.where(np.arange(x.size) // 6 == 12, x + 0.1, x) if x.size == 24 * 2 * 3 else x for x in found]

    use(monkeypatch, launch)
    assert not solve(SEQUENTIAL, RATES)[1].any()
    monkeypatch.setattr(_stepper, "_MOST_CHECKED", 0)
    jax.clear_caches()
    # Every third step is checked, neither this one nor the one from its result.
    assert solve(SEQUENTIAL, RATES)[1].all()


@pytest.mark.full
def test_wrong_numbers_in_a_first_guess_are_corrected_by_newtons_method(wrong):
    ys, successful = solve(parallel_solver(dfx.Heun(), 24), RATES)
    assert successful.all()
    np.testing.assert_allclose(ys, expected(), rtol=1e-10)


def test_a_field_whose_scalar_form_fails_runs_in_arrays(gpu, monkeypatch):
    monkeypatch.setenv(_probe.VARIABLE, "off")
    monkeypatch.setattr(_stepper, "step_through_scalars", failing)
    ys, successful = solve(SEQUENTIAL, RATES)
    assert successful.all()
    np.testing.assert_allclose(ys, expected(), rtol=1e-13)


def test_kernels_are_switched_by_an_environment_variable(gpu, monkeypatch):
    tests = []

    def counted(launch):
        tests.append(launch)
        return True

    monkeypatch.setattr(_probe, "installed", lambda package: True)
    monkeypatch.setenv(_probe.VARIABLE, "off")
    assert _probe.backend(counted) is None and not tests
    for value, launch in (("auto", _mosaic.launch), ("mosaic", _mosaic.launch), ("warp", _warp.launch)):
        monkeypatch.setenv(_probe.VARIABLE, value)
        assert _probe.backend(counted) is launch is _probe.backend(counted)
    assert tests == [_mosaic.launch, _mosaic.launch, _warp.launch]
    monkeypatch.setenv(_probe.VARIABLE, "Mosaic")
    message = "`PARALLEL_DIFFRAX_KERNELS=Mosaic`: expected one of 'auto', 'mosaic', 'warp', 'off' in the environment."
    with pytest.raises(ValueError) as raised:
        _probe.on_cpu()
    assert str(raised.value) == message


def test_an_older_gpu_runs_kernels_by_warp_where_it_is_installed(gpu, monkeypatch):
    gpu.compute_capability = "7.5"
    monkeypatch.setattr(_probe, "installed", lambda package: True)
    assert _probe.backend(works) is _warp.launch
    # So does a newer one whose release of JAX has broken Mosaic.
    gpu.compute_capability = "9.0"
    assert _probe.backend(lambda launch: launch is _warp.launch) is _warp.launch


def test_a_gpu_that_is_too_old_or_without_warp_runs_no_kernels_unless_asked_to(gpu, monkeypatch):
    gpu.compute_capability = "8.0"
    with pytest.warns(RuntimeWarning, match=r"compute capability 8\.0 is below 9\.0; warp: it is not installed"):
        assert _probe.backend(works) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Another kernel, the same reason.
        assert _probe.backend(lambda launch: True) is None
        monkeypatch.setenv(_probe.VARIABLE, "mosaic")
        assert _probe.backend(works) is _mosaic.launch
    monkeypatch.setenv(_probe.VARIABLE, "auto")
    monkeypatch.setattr(_probe, "installed", lambda package: True)
    gpu.compute_capability = "7.0"
    assert _probe.backend(lambda launch: True) is None


def kernel_steps(kernels):
    """How many steps a kernel made, for each member, and whether all is right."""
    solver = pdx.ParallelSolver(dfx.Heun(), 24, policy=pdx.policies.Sequential(kernels))

    def one(rate):
        saveat = dfx.SaveAt(t1=True, solver_state=True)
        return dfx.diffeqsolve(TERM, solver, 0.0, 1.0, 1.0, jnp.array([1.0, 0.5]), rate, max_steps=1, saveat=saveat)

    solution = jax.jit(jax.vmap(one))(RATES)
    np.testing.assert_allclose(solution.ys[:, 0], expected(), rtol=1e-13)
    statistics = pdx.statistics(solution)
    assert statistics.sequential_steps.tolist() == [24] * 3
    return statistics.kernel_steps.tolist()


def test_steps_in_sequence_run_by_warp_on_a_cpu_if_asked_to_and_the_statistics_say_so(monkeypatch):
    launch_by_warp()
    # The argument, beside the environment, and against it.
    assert kernel_steps("warp") == [24] * 3
    monkeypatch.setenv(_probe.VARIABLE, "warp")
    assert _probe.setting("auto") == "warp" and not _probe.on_cpu()
    assert kernel_steps("off") == [0] * 3


@pytest.mark.full
def test_implicit_steps_and_a_field_with_a_loop_run_in_a_kernel():
    launch_by_warp()

    def field(t, y, mu):
        damping, _ = jax.lax.while_loop(
            lambda c: c[1] < mu, lambda c: (c[0] * y[1], c[1] + 1), (1 - y[0] ** 2, jnp.zeros(()))
        )
        return jnp.stack([y[1], damping - y[0]])

    def solve(solver, dt0, mu):
        saveat = dfx.SaveAt(t1=True, solver_state=True)
        return dfx.diffeqsolve(
            dfx.ODETerm(field), solver, 0.0, 1.0, dt0, jnp.array([2.0, 0.5]), mu, max_steps=24, saveat=saveat
        )

    batch = lambda solver, dt0: jax.jit(jax.vmap(functools.partial(solve, solver, dt0)))(jnp.array([1.0, 2.0]))
    policy = pdx.policies.Sequential("warp")
    found = batch(pdx.ParallelSolver(dfx.ImplicitEuler(), 24, policy=policy), 1.0)
    assert pdx.statistics(found).kernel_steps.tolist() == [24, 24]
    root_finder = optx.Newton(rtol=1e-10, atol=1e-10)
    want = batch(dfx.ImplicitEuler(root_finder=root_finder), 1 / 24)
    np.testing.assert_allclose(found.ys, want.ys, rtol=1e-6)


def test_on_several_devices_the_statistics_know_that_xla_makes_the_steps_of_a_large_batch(gpu, monkeypatch):
    use(monkeypatch, emulated_threads.launch)
    assert kernel_steps("auto") == [24] * 3
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    monkeypatch.setattr(_batches, "_LARGEST_REPEATED_BATCH", 2)
    jax.clear_caches()
    assert kernel_steps("auto") == [0] * 3


@pytest.mark.parametrize("policy", [pdx.AdaptivePolicy, pdx.policies.ParallelThenSequential])
def test_an_unknown_backend_is_refused(policy):
    with pytest.raises(ValueError, match=r"kernels='cuda'\)`: expected one of 'auto', 'mosaic', 'warp', 'off'"):
        policy(kernels="cuda")


@pytest.mark.parametrize("test", [_loop.passes_common_test, _loop.passes_rare_test])
def test_warp_on_a_cpu_passes_the_tests_at_first_use(test):
    assert test(launch_by_warp())
