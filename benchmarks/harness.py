"""Timing and results: compile time apart from run time, medians, fresh inputs, and the environment of each measurement."""

import concurrent.futures
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax


RESULTS = pathlib.Path(__file__).parent / "results"
# Number of programs that `build_all` compiles at once. Each counts for two processors, since compilations use threads of
# their own.
jobs = max(1, min(8, (os.cpu_count() or 1) // 2))


def environment() -> dict:
    """The environment on which a measurement depends: device, processors, Python, precision and packages."""
    device = jax.devices()[0]
    packages = ["jax", "jaxlib", "diffrax", "equinox", "optimistix", "lineax", "numpy"]
    packages += [name for name in ("warp-lang", "gradsolve", "galax", "dynestyx") if _installed(name)]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": jax.device_count(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "x64": bool(jax.config.read("jax_enable_x64")),
        "packages": {name: metadata.version(name) for name in packages},
    }


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


class Program(NamedTuple):
    """A compiled function of one argument, and the time that its compilation took.

    - `call`: the compiled function.
    - `trace_s`: the time to trace and lower it, in seconds.
    - `compile_s`: the whole time to trace, lower and compile it, in seconds.

    Both times are `None` if other programs were compiled at the same time.
    """

    call: Callable
    trace_s: float | None
    compile_s: float | None

    @property
    def times(self) -> dict:
        """Both times as entries of a row."""
        return {"trace_s": self.trace_s, "compile_s": self.compile_s}


def _jitted(fn: Callable) -> Any:
    return fn if hasattr(fn, "lower") else jax.jit(fn)


def build(fn: Callable, argument) -> Program:
    """Compiles a function of one argument, with no other compilation at the same time."""
    start = time.perf_counter()
    lowered = _jitted(fn).lower(argument)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return Program(compiled, traced - start, time.perf_counter() - start)


def build_all(fns: Mapping[Any, tuple[Callable, Any]]) -> dict[Any, Program]:
    """Compiles several functions, each given with its argument, `jobs` at a time. Tracing runs in Python, so it is not
    concurrent.

    **Returns:** the programs by name. They have compile times only if `jobs` is 1: the time of a concurrent compilation
    means nothing. A program that failed to compile raises when it is called, so that the others can still be measured.
    """
    if jobs < 2:
        return {
            name: _attempt(lambda fn=fn, argument=argument: build(fn, argument)) for name, (fn, argument) in fns.items()
        }
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {name: pool.submit(_jitted(fn).lower(argument).compile) for name, (fn, argument) in fns.items()}
        return {
            name: _attempt(lambda future=future: Program(future.result(), None, None))
            for name, future in futures.items()
        }


def _attempt(make: Callable[[], Program]) -> Program:
    """The program; if making it raises, a program that raises the same error when called."""
    try:
        return make()
    except jax.errors.JaxRuntimeError as error:

        def fail(_, error=error):
            raise error

        return Program(fail, None, None)


def clock(call: Callable, inputs: Sequence, repeats: int, warm: bool = True) -> tuple[Any, dict]:
    """Times a compiled function of one argument.

    **Arguments:**

    - `call`: the function, compiled.
    - `inputs`: at least two different arguments. Calls cycle through them, so that no call repeats the one before.
    - `repeats`: the number of timed calls.
    - `warm`: whether an untimed call comes first. The first call of a program must never be timed. If a call takes seconds
        and only a setting has changed since the last one, `warm=False` saves the extra call.

    **Returns:** the result for the first argument; and a dictionary of `median_ms`, `min_ms`, `max_ms` and `repeats`.
    """
    value, times = None, []
    for k in range(repeats + warm):
        argument = jax.block_until_ready(inputs[k % len(inputs)])
        start = time.perf_counter()
        out = jax.block_until_ready(call(argument))
        times.append(1e3 * (time.perf_counter() - start))
        value = out if k == 0 else value
    times = times[1:] if warm else times
    summary = {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times), "repeats": repeats}
    return value, summary


def measure(fn: Callable, inputs: Sequence, repeats: int, values: list | None = None) -> dict:
    """Compiles a function of one argument and times it.

    **Arguments:** as in `clock`, and `values`: a list to which the result for the first argument is appended. Calling `fn`
    again to get it would compile again.

    **Returns:** `trace_s`, `compile_s`, and the times of `clock`.
    """
    program = build(fn, inputs[0])
    value, times = clock(program.call, inputs, repeats)
    if values is not None:
        values.append(value)
    return {**program.times, **times}


def result_name(part: str) -> str:
    """The name of a part's result file, which ends with the platform: `<part>_gpu` or `<part>_cpu`."""
    return f"{part}_{jax.devices()[0].platform}"


def write(name: str, rows: list[dict], folder: pathlib.Path | None = None, **more) -> pathlib.Path:
    """Writes the environment, the entries in `more` and the rows to `results/<name>.json`."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **more, "rows": rows}, indent=1) + "\n")
    return path


def read(part: str, device: str, folder: pathlib.Path | None = None) -> tuple[dict, list[dict]]:
    """The content of a result file, and its rows that did not fail.

    **Raises:** `FileNotFoundError` if there is no file or every row in it failed.
    """
    path = (RESULTS if folder is None else folder) / f"{part}_{device}.json"
    if not path.exists():
        raise FileNotFoundError(f"no results of {part}: {path} (python -m benchmarks --only {part})")
    content = json.loads(path.read_text())
    rows = [row for row in content["rows"] if "failed" not in row]
    if not rows:
        raise FileNotFoundError(f"no results of {part}: every row of {path} failed")
    return content, rows


def table(rows: list[dict], columns: list[str]) -> str:
    """The chosen columns of the rows, as a text table."""
    cells = [columns] + [[show(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def show(value) -> str:
    """A value as a cell of a table."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.2f}"
    return "" if value is None else str(value)
