"""The only file that imports a private name of JAX."""


def interpreted():
    """What `mosaic.kernel(interpret=...)` takes to run a kernel in NumPy, in tests on a CPU.

    `interpret=True`, which is public, ignores the grid of a batch (JAX 0.10). Raises `ImportError` where a release of JAX has
    moved the name; only tests need it.
    """
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
