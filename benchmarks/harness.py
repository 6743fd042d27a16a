"""Timing that is worth reporting: compile time apart from run time, medians, fresh inputs, and where it was measured."""

import json
import pathlib
import platform
import statistics
import time
from importlib import metadata

import jax


RESULTS = pathlib.Path(__file__).parent / "results"


def environment() -> dict:
    """What a number depends on besides the code."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "diffrax", "equinox", "optimistix", "lineax", "numpy")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": jax.device_count(),
        "python": platform.python_version(),
        "x64": bool(jax.config.read("jax_enable_x64")),
        "packages": {name: metadata.version(name) for name in packages},
    }


def measure(fn, inputs, repeats: int, values: list | None = None) -> dict:
    """Times the jitted function of one argument.

    **Arguments:**

    - `fn`: a function that has been passed to `jax.jit`.
    - `inputs`: at least two different arguments; calls go round them, so that no call repeats the last.
    - `repeats`: the number of timed calls, after one that is not.
    - `values`: a list to which the result for the first argument is appended; `fn` would be compiled again for it.

    **Returns:** `compile_s`, and the `median_ms`, `min_ms` and `max_ms` of the timed calls.
    """
    start = time.perf_counter()
    compiled = fn.lower(inputs[0]).compile()
    compile_s = time.perf_counter() - start
    value = jax.block_until_ready(compiled(inputs[0]))
    if values is not None:
        values.append(value)
    times = []
    for k in range(repeats):
        argument = jax.block_until_ready(inputs[(k + 1) % len(inputs)])
        start = time.perf_counter()
        jax.block_until_ready(compiled(argument))
        times.append(1e3 * (time.perf_counter() - start))
    return {
        "compile_s": compile_s,
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "repeats": repeats,
    }


def write(name: str, rows: list[dict], folder: pathlib.Path | None = None) -> pathlib.Path:
    """Writes rows and the environment to `results/<name>.json`."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path


def table(rows: list[dict], columns: list[str]) -> str:
    """The chosen columns of the rows as text."""
    cells = [columns] + [[_show(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def _show(value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.2f}"
    return "" if value is None else str(value)
