"""Timing that is worth reporting: compile time apart from run time, medians, fresh inputs, and where it was measured."""

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
# Programs that are compiled at once, where several are asked for. Two processors are counted for each: compilations have
# threads of their own.
jobs = max(1, min(8, (os.cpu_count() or 1) // 2))


def environment() -> dict:
    """What a number depends on besides the code."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "diffrax", "equinox", "optimistix", "lineax", "numpy")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": jax.device_count(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "x64": bool(jax.config.read("jax_enable_x64")),
        "packages": {name: metadata.version(name) for name in packages},
    }


class Program(NamedTuple):
    """A compiled function of one argument, and how long that took.

    - `call`: the function.
    - `trace_s`: the time to trace and lower it.
    - `compile_s`: the whole time until it could run; `None` if others were compiled at the same time.
    """

    call: Callable
    trace_s: float | None
    compile_s: float | None

    @property
    def times(self) -> dict:
        """As entries of a row."""
        return {"trace_s": self.trace_s, "compile_s": self.compile_s}


def _jitted(fn: Callable) -> Any:
    return fn if hasattr(fn, "lower") else jax.jit(fn)


def build(fn: Callable, argument) -> Program:
    """Compiles a function of one argument, alone."""
    start = time.perf_counter()
    lowered = _jitted(fn).lower(argument)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return Program(compiled, traced - start, time.perf_counter() - start)


def build_all(fns: Mapping[Any, tuple[Callable, Any]]) -> dict[Any, Program]:
    """Compiles several functions, each given with its argument, `jobs` at once. Tracing is Python and takes turns.

    **Returns:** the programs; without the times to compile, which mean nothing if they were not alone. One that could not be
    compiled raises when it is called, so that the others can be measured before.
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
    """The program, or one that raises what making it raised."""
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
    - `inputs`: at least two different arguments; calls go round them, so that no call repeats the last.
    - `repeats`: the number of timed calls.
    - `warm`: whether they follow one that is not timed. The first call of a program is never to be timed; one that takes
        seconds need not be made twice with every setting.

    **Returns:** the result for the first argument; `median_ms`, `min_ms`, `max_ms` and `repeats`.
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

    **Arguments:** as of `clock`, and `values`: a list to which the result for the first argument is appended; `fn` would
    be compiled again for it.

    **Returns:** `trace_s`, `compile_s`, and the times of `clock`.
    """
    program = build(fn, inputs[0])
    value, times = clock(program.call, inputs, repeats)
    if values is not None:
        values.append(value)
    return {**program.times, **times}


def result_name(part: str) -> str:
    """Results on a GPU and on a CPU have files of their own."""
    return f"{part}_{jax.devices()[0].platform}"


def write(name: str, rows: list[dict], folder: pathlib.Path | None = None, **more) -> pathlib.Path:
    """Writes rows, the environment and whatever else is given to `results/<name>.json`."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **more, "rows": rows}, indent=1) + "\n")
    return path


def read(part: str, device: str, folder: pathlib.Path | None = None) -> tuple[dict, list[dict]]:
    """What a file of results says, and those of its rows that did not fail.

    **Raises:** `FileNotFoundError` if there is no file, or every row in it failed.
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
    """The chosen columns of the rows as text."""
    cells = [columns] + [[show(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def show(value) -> str:
    """A value as a cell of a table."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.2f}"
    return "" if value is None else str(value)
