"""Runs the benchmarks one part after another, and writes each row of results as soon as it is measured.

    python -m benchmarks [--quick] [--only PART ...] [--out FOLDER] [--jobs K]

`--quick` takes small sizes, for a machine without a GPU. Without `--only`, all standard parts run. `--list` shows the
standard parts and the others. A part that fails or exceeds its time limit keeps the rows that it has, and the other parts
still run. The exit status is then 1, as it is if a row has an entry `failed`.
"""

import argparse
import importlib
import pathlib
import sys
import time
import traceback

import jax

from . import harness


# Name: time limit of the part in seconds. It is checked after every row, except in a quick run, whose machine may be slow.
# Each part is a module of this package with a function `rows(quick)`, which yields each row when it is measured.
# The first part starts with the time to compile the first program of the process.
STANDARD = {
    "steps": 240,
    "precision": 240,
    "iteration": 60,
    "scans": 120,
    "batch": 120,
    "dimension": 120,
    "methods": 120,
}
# Parts that run only if they are named: they take longer or need another machine.
OTHERS = {
    "regimes": 590,
    "ensembles": 300,
    "kernels": 400,
    "cost": 400,
    "gradsolve": 120,
    "peers": 200,
    "large": 300,
    "devices": 600,
    "outputs": 300,
    "neural_ode": 300,
    "chaos": 600,
    "stiff": 600,
    "family": 3600,
    "theory": 1800,
    "examples": 1800,
    "packages": 600,
}

# Parts whose result file has another name.
FILES = {"chaos": "chaos_speed", "stiff": "stiff_grid"}


def run_part(name: str, quick: bool, folder: pathlib.Path | None, seconds: float) -> bool:
    """Runs one part and writes its results after every row. Returns whether the part is complete and no row failed."""
    start, rows, complete = time.perf_counter(), [], False
    result = harness.result_name(FILES.get(name, name))
    print(f"== {name}", flush=True)
    try:
        module = importlib.import_module(f".{name}", __package__)
        for row in module.rows(quick):
            rows.append(row)
            print("  " + show(row), flush=True)
            harness.write(result, rows, folder, quick=quick, complete=False)
            if not quick and time.perf_counter() - start > seconds:
                print(f"!! {name}: stopped after {seconds} s with {len(rows)} rows", flush=True)
                break
        else:
            failed = sum("failed" in row for row in rows)
            complete = failed == 0
            if failed:
                print(f"!! {name}: {failed} rows say that they failed", flush=True)
    except Exception:
        traceback.print_exc()
        print(f"!! {name}: failed after {len(rows)} rows", flush=True)
    if rows:
        spent = time.perf_counter() - start
        path = harness.write(result, rows, folder, quick=quick, complete=complete, seconds=spent)
        print(f"== {name}: {spent:.0f} s, {path}", flush=True)
    return complete and bool(rows)


def show(row: dict) -> str:
    """A row on one line, without nested entries and lists."""
    return "  ".join(
        f"{key}={harness.show(value)}"
        for key, value in row.items()
        if value is not None and not isinstance(value, dict | list)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, for a machine without a GPU")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[*STANDARD, *OTHERS], help="these parts")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder of the results")
    parser.add_argument("--jobs", type=int, default=harness.jobs, help="number of programs compiled at once")
    parser.add_argument("--list", action="store_true", help="show the parts and stop")
    options = parser.parse_args()
    limits = STANDARD | OTHERS
    if options.list:
        for name, seconds in limits.items():
            print(f"{name:12s} at most {seconds} s{'' if name in STANDARD else ', only if named'}")
        return 0
    harness.jobs = options.jobs
    # This precedes the imports of the parts, since some of them make arrays at import.
    jax.config.update("jax_enable_x64", True)
    print(harness.environment(), flush=True)
    done = {name: run_part(name, options.quick, options.out, limits[name]) for name in options.only or STANDARD}
    failed = [name for name, complete in done.items() if not complete]
    if failed:
        print(f"!! incomplete: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
