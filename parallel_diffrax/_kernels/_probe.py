"""What the device can do: probed, not assumed."""

from collections.abc import Callable

import jax


# The oldest GPUs that Mosaic compiles for, Hopper: their compute capability.
_OLDEST_GPU = 9.0


def on_cpu() -> bool:
    """Whether JAX's default backend is a CPU, on which neither kernels nor programs in scalars pay."""
    return jax.default_backend() == "cpu"


def device_supports_kernels(self_test: Callable[[], bool]) -> bool:
    """Whether the default device is a GPU that Mosaic compiles for, and passes this test of a kernel."""
    try:
        device = jax.devices()[0]
        return device.platform == "gpu" and float(device.compute_capability) >= _OLDEST_GPU and self_test()
    except Exception:  # of any kind: an optional fast path must never be the reason that nothing runs
        return False
