"""The adaptive Lorenz loop of `ensembles` by each backend of kernels, beside the Warp kernel of gradsolve, called in turn.

Needs `gradsolve` and `warp-lang` installed, and a GPU. Both loops choose their steps by their own controllers, at the same
tolerances; the results of both are compared.
"""

import functools
import os
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from .ensembles import ATOL, lorenz_in_one_loop, LORENZ_START, RTOL
from .kernels import VARIABLE


_FIRST_STEP = 1e-2


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    for batch in (16,) if quick else (1024, 32768, 524288):
        yield row(batch)


def row(batch: int) -> dict:
    # Imported on demand: somebody else's package, for this comparison only.
    from gradsolve.warp import warp_ode  # pyright: ignore[reportMissingImports]

    rhos = [jnp.linspace(0.0, 21.0 - 1e-3 * k, batch) for k in range(3)]
    y0, settings = jnp.broadcast_to(jnp.array(LORENZ_START), (batch, 3)), jnp.array([0.0, 1.0, RTOL, ATOL, _FIRST_STEP])
    run = warp_ode._ffi_runner(batch, 4096, False, "float64")
    calls = {"gradsolve": lambda rho: run(y0, rho, settings)[0]}
    before = os.environ.get(VARIABLE)
    for name in ("mosaic", "warp"):
        os.environ[VARIABLE] = name
        jax.clear_caches()
        compiled = jax.jit(jax.vmap(lorenz_in_one_loop)).lower(rhos[0]).compile()
        calls[name] = functools.partial(lambda compiled, rho: compiled(rho)[0], compiled)
    os.environ.pop(VARIABLE)
    if before is not None:
        os.environ[VARIABLE] = before
    times, ends = {name: [] for name in calls}, {}
    for k in range(60):
        for name, call in calls.items():
            start = time.perf_counter()
            end = jax.block_until_ready(call(rhos[k % 3]))
            times[name].append(1e3 * (time.perf_counter() - start))
            ends.setdefault(name, np.asarray(end))
    found: dict = {"batch": batch}
    for name, measured in times.items():
        found |= {f"{name}_ms": statistics.median(measured[5:]), f"{name}_min_ms": min(measured[5:])}
        found[f"{name}_difference"] = float(np.max(np.abs(ends[name] - ends["mosaic"]) / (1 + np.abs(ends["mosaic"]))))
    return found
