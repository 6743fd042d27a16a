"""Whether kernels may run: what the user asks for, and what the default device supports."""

import functools
import os
import warnings
from collections.abc import Callable

import jax


# The environment variable that switches kernels on and off.
VARIABLE = "PARALLEL_DIFFRAX_KERNELS"
_SETTINGS = ("auto", "mosaic", "off")
# The smallest compute capability for which Mosaic is known to compile: Hopper.
_OLDEST_GPU = 9.0


def on_cpu() -> bool:
    """Whether JAX's default backend is a CPU. Neither kernels nor programs in scalars pay there."""
    setting()  # raises, on every device, if it is not one of those that are known
    return jax.default_backend() == "cpu"


def setting() -> str:
    """The value of `PARALLEL_DIFFRAX_KERNELS`: `auto`, the default, runs kernels on the GPUs for which they are known to
    compile; `mosaic` tries any GPU; `off` runs none."""
    value = os.environ.get(VARIABLE, "auto")
    if value not in _SETTINGS:
        raise ValueError(f"`{VARIABLE}={value}`: expected one of {', '.join(map(repr, _SETTINGS))} in the environment.")
    return value


def kernels_run(self_test: Callable[[], bool]) -> bool:
    """Whether kernels are switched on, the default device is a GPU that supports them, and `self_test` passes on it. A
    `self_test` runs once in each process. A GPU that does not pass is reported in one warning."""
    return setting() != "off" and _device_passes(self_test, setting())


@functools.cache
def _device_passes(self_test: Callable[[], bool], setting: str) -> bool:
    try:
        device = jax.devices()[0]
        if device.platform != "gpu":
            return False
        capability = float(device.compute_capability)
        if setting == "auto" and capability < _OLDEST_GPU:
            decline(f"its compute capability {capability} is below {_OLDEST_GPU}")
            return False
        if self_test():
            return True
        decline(f"a test kernel (`{self_test.__name__}`) returned wrong numbers")
    except Exception as error:  # of any kind: an optional fast path must never be the reason that nothing runs
        decline(f"a test kernel failed: {type(error).__name__}: {error}")
    return False


_declined: list[str] = []


def decline(reason: str):
    """Warns that kernels do not run, the first time."""
    if not _declined:
        message = (
            f"parallel_diffrax: this GPU runs no kernels of ours, since {reason[:500]}. Programs run in XLA instead, which "
            f"is slower if steps are made in sequence. Set `{VARIABLE}=off` in the environment to silence this warning."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    _declined.append(reason)
