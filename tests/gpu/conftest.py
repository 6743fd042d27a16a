"""Skips everything without a GPU, and writes what ran to `benchmarks/results/kernels_by_value_gpu.json`."""

import datetime
import json
import pathlib

import jax
import pytest

from benchmarks import harness


FILE = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "kernels_by_value_gpu.json"
HERE = pathlib.Path(__file__).parent
outcomes: dict[str, str] = {}


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if jax.default_backend() != "gpu":
                item.add_marker(pytest.mark.skip(reason="kernels run by value on a GPU only, and JAX finds none here"))


def pytest_runtest_logreport(report):
    if report.when == "call" or report.failed:
        outcomes[report.nodeid.rpartition("/")[2]] = report.outcome


def pytest_sessionfinish():
    if not outcomes:
        return
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "environment": harness.environment(),
        "passed": sum(outcome == "passed" for outcome in outcomes.values()),
        "outcomes": outcomes,
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n")
