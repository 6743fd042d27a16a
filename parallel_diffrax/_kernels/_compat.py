"""The only file that imports a private name of JAX."""


def interpreted():
    """The value of `mosaic.kernel(interpret=...)` that runs a kernel in NumPy, for tests on a CPU.

    The public `interpret=True` ignores the grid of a batch (JAX 0.10). Raises `ImportError` if a release of JAX has moved
    the name. Only tests need it.
    """
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
