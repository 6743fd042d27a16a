"""Probes what the device supports."""

from collections.abc import Callable

import jax


# The smallest compute capability for which Mosaic compiles: Hopper.
_OLDEST_GPU = 9.0


def on_cpu() -> bool:
    """Whether JAX's default backend is a CPU. Neither kernels nor programs in scalars pay there."""
    return jax.default_backend() == "cpu"


def device_supports_kernels(self_test: Callable[[], bool]) -> bool:
    """Whether the default device is a GPU for which Mosaic compiles, and a kernel passes `self_test` on it."""
    try:
        device = jax.devices()[0]
        return device.platform == "gpu" and float(device.compute_capability) >= _OLDEST_GPU and self_test()
    except Exception:  # of any kind: an optional fast path must never be the reason that nothing runs
        return False
