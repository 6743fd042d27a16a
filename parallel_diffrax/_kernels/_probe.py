"""Which kernels may run: what the user asks for, and what the default device supports."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.lax as lax

from . import _mosaic, _warp
from ._threads import Launch


# The environment variable that chooses the backend of kernels, or switches them off.
VARIABLE = "PARALLEL_DIFFRAX_KERNELS"
SETTINGS = ("auto", "mosaic", "warp", "off")


class Backend(NamedTuple):
    """What compiles kernels. `oldest` is the smallest compute capability for which it is known to compile."""

    name: str
    launch: Launch
    oldest: float


# In the order in which `auto` tries them. On an H200, Mosaic is as fast as Warp or faster everywhere, since XLA launches its
# kernels without a call through the host: 0.05 against 0.13 ms a call, 0.18 against 0.29 ms for 512 Tsit5 steps of 1024
# members (XLA 1.2 ms), 4.6 against 5.1 ms of 524288 (13.6 ms); scans alike to a third slower
# (`benchmarks/results/kernels_gpu.json`). Below Hopper Mosaic's kernels do not assemble: they begin with `elect.sync` and a
# fence for barriers, which need sm_90, whatever the program is. Warp's compile for sm_75 and newer.
_BACKENDS = (Backend("mosaic", _mosaic.launch, 9.0), Backend("warp", _warp.launch, 7.5))


def setting(kernels: str = "auto") -> str:
    """The backend that is asked for: `kernels`, or the value of `PARALLEL_DIFFRAX_KERNELS` if that is `auto`. `auto`, the
    default, runs kernels on the GPUs for which they are known to compile; `mosaic` and `warp` try that backend on any GPU,
    `warp` also on a CPU; `off` runs none."""
    value = os.environ.get(VARIABLE, "auto")
    if value not in SETTINGS:
        raise ValueError(f"`{VARIABLE}={value}`: expected one of {', '.join(map(repr, SETTINGS))} in the environment.")
    return value if kernels == "auto" else kernels


def on_cpu(kernels: str = "auto") -> bool:
    """Whether JAX's default backend is a CPU, where neither kernels nor programs in scalars pay, and kernels are not asked
    for by name."""
    asked = setting(kernels)  # raises, on every device, if the environment's is not one of those that are known
    return jax.default_backend() == "cpu" and asked != "warp"


def platform() -> str:
    """The platform for which kernels are lowered."""
    return "cpu" if jax.devices()[0].platform == "cpu" else "cuda"


def by_platform(*args, kernel: Callable, cpu: Callable, default: Callable):
    """`lax.platform_dependent`, with `kernel` on GPUs and on the platform of kernels; else `cpu` on CPUs."""
    return lax.platform_dependent(*args, default=default, **{"cpu": cpu, "cuda": kernel} | {platform(): kernel})


def backend(self_test: Callable[[Launch], bool], kernels: str = "auto") -> Launch | None:
    """`launch` of the first backend that is asked for, supports the default device and passes `self_test(launch)` on it;
    `None` if there is none. A `self_test` runs once in each process. A GPU without a backend is reported in one warning."""
    asked = setting(kernels)
    return None if asked == "off" else _choose(self_test, asked)


@functools.cache
def _choose(self_test: Callable[[Launch], bool], asked: str) -> Launch | None:
    reasons = []
    device = jax.devices()[0]
    for found in _BACKENDS:
        on_device = device.platform == "gpu" or (device.platform == "cpu" and asked == "warp")
        if asked not in ("auto", found.name) or not on_device:
            continue
        try:
            reason = _obstacle(found, device, asked)
            if reason is None:
                if self_test(found.launch):
                    return found.launch
                reason = f"a test kernel (`{self_test.__name__}`) returned wrong numbers"
        except Exception as error:  # of any kind: an optional fast path must never be the reason that nothing runs
            reason = f"a test kernel failed: {type(error).__name__}: {error}"
        reasons.append(f"{found.name}: {reason[:300]}")
    if reasons:
        decline("; ".join(reasons))
    return None


def installed(package: str) -> bool:
    """Whether an optional package can be imported."""
    return importlib.util.find_spec(package) is not None


def _obstacle(found: Backend, device, asked: str) -> str | None:
    """Why a backend does not support a device."""
    if found.name == "warp" and not installed("warp"):
        return "it is not installed (`pip install 'parallel_diffrax[warp]'`)"
    if asked == "auto" and float(device.compute_capability) < found.oldest:
        return f"the device's compute capability {device.compute_capability} is below {found.oldest}"
    return None


_declined: list[str] = []


def decline(reason: str):
    """Warns that kernels do not run, the first time."""
    if not _declined:
        message = (
            f"parallel_diffrax: this device runs no kernels of ours, since {reason[:700]}. Programs run in XLA instead, "
            f"which is slower if steps are made in sequence. Set `{VARIABLE}=off` in the environment to silence this."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    _declined.append(reason)
