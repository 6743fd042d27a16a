"""The benchmarks' runner keeps what was measured, and says what was not; the comparison at equal error is right."""

import importlib
import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx
from benchmarks import harness, pages, precision, scans, theory
from benchmarks.__main__ import OTHERS, run_part, STANDARD
from benchmarks.references import load
from benchmarks.smooth_problems import PROBLEMS

from .problems import only_full


@pytest.mark.parametrize("name", sorted({*STANDARD, *OTHERS}))
def test_every_part_can_be_imported_and_has_rows(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").rows)


def part(monkeypatch, rows):
    """A part that yields these rows, exceptions being raised."""

    def run(quick):
        for row in rows:
            if isinstance(row, Exception):
                raise row
            yield row

    module = types.ModuleType("benchmarks.made_up")
    module.rows = run
    monkeypatch.setitem(sys.modules, "benchmarks.made_up", module)


@pytest.mark.parametrize("rows", [[{"a": 1.0}, ValueError("no")], [{"a": 1.0}, {"failed": "no"}], [ValueError("no")]])
def test_a_part_that_fails_keeps_its_rows_and_is_not_complete(monkeypatch, tmp_path, rows, capsys):
    part(monkeypatch, rows)
    assert not run_part("made_up", True, tmp_path, 60.0)
    assert "!! made_up" in capsys.readouterr().out
    kept = [row for row in rows if isinstance(row, dict)]
    path = tmp_path / f"{harness.result_name('made_up')}.json"
    assert path.exists() == bool(kept)
    if kept:
        content = json.loads(path.read_text())
        assert content["rows"] == kept and content["complete"] is False and "jax" in content["environment"]["packages"]


def test_a_part_over_its_time_is_stopped_and_one_within_it_is_complete(monkeypatch, tmp_path):
    part(monkeypatch, [{"a": 1.0}, {"a": 2.0}])
    assert run_part("made_up", False, tmp_path, 60.0)
    assert not run_part("made_up", False, tmp_path, 0.0)
    path = tmp_path / f"{harness.result_name('made_up')}.json"
    assert json.loads(path.read_text())["rows"] == [{"a": 1.0}]


def test_times_are_of_calls_after_the_first_and_values_of_the_first_argument():
    program = harness.build(lambda x: 2 * x, jnp.arange(3.0))
    value, times = harness.clock(program.call, [jnp.arange(3.0), jnp.ones(3)], 4)
    np.testing.assert_array_equal(value, 2 * np.arange(3.0))
    assert times["repeats"] == 4 and 0 < times["min_ms"] <= times["median_ms"] <= times["max_ms"]
    assert program.compile_s > program.trace_s > 0


def test_the_time_at_an_error_is_interpolated_in_logarithms():
    found = [(1e-2, 1.0), (1e-6, 100.0)]
    assert precision.time_at(found, 1e-4) == pytest.approx(10.0)
    assert precision.time_at(found, 1e-6) == 100.0
    assert precision.time_at(found, 1e-7) is None
    # A run that is more accurate and faster counts.
    assert precision.time_at([*found, (1e-9, 5.0)], 1e-4) == 5.0


def test_the_scans_are_those_that_users_can_choose():
    found = scans.choices()
    assert {name for name in vars(pdx) if name.endswith("Scan")} <= set(found)
    assert all(isinstance(scan, str) or type(scan).__name__ == name for name, scan in found.items())


def test_every_problem_of_the_comparison_has_a_reference():
    references = load()
    assert {*precision.SMOOTH, *precision.STIFF} <= set(references)
    assert all(np.all(np.isfinite(state)) for state in references.values())
    # The Kepler problem keeps its energy.
    x, v = np.split(references["Kepler, T = 60"], 2)
    start = PROBLEMS["Kepler, T = 60"].y0
    energy = lambda x, v: np.sum(v**2) / 2 - 1 / math.sqrt(np.sum(x**2))
    assert energy(x, v) == pytest.approx(energy(*np.split(start, 2)), rel=1e-13)


def test_results_that_are_missing_or_failed_are_named_and_others_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results of steps"):
        harness.read("steps", "gpu", tmp_path)
    path = harness.write("steps_gpu", [{"failed": "no"}], tmp_path)
    with pytest.raises(FileNotFoundError, match=f"every row of {path} failed"):
        harness.read("steps", "gpu", tmp_path)
    harness.write("steps_gpu", [{"failed": "no"}, {"N": 1}], tmp_path, quick=True)
    content, rows = harness.read("steps", "gpu", tmp_path)
    assert rows == [{"N": 1}] and len(content["rows"]) == 2 and content["quick"] is True


def test_the_smallest_singular_value_is_that_of_the_matrix_and_lies_between_its_bounds():
    A = np.random.default_rng(0).normal(size=(6, 2, 2))
    L = np.eye(12)
    for i in range(1, 6):
        L[2 * i : 2 * i + 2, 2 * i - 2 : 2 * i] = -A[i]
    value = theory.smallest_singular_value(A)
    assert value == pytest.approx(np.linalg.svd(L, compute_uv=False)[-1], rel=1e-10)
    for exponent in (-0.3, 0.0, 0.2):
        a, b, lower, upper = theory.growth_bounds(A, exponent)
        assert lower <= value <= upper and a >= 1 >= b
    # Of equal rotations every product has the norm one: both constants are one, and the bounds are those of a closed form.
    turn = np.broadcast_to([[0.6, -0.8], [0.8, 0.6]], (6, 2, 2))
    np.testing.assert_allclose(theory.growth_bounds(turn, 0.0), [1, 1, 1 / 6, 1])


def test_every_picture_of_the_theory_has_its_rows():
    """On the smallest cases, what the theory says."""
    name = "driven pendulum"
    (solve,) = theory.exponents(name, (32,), 1)
    assert solve["success"] and solve["iterations"] <= 6 and solve["difference"] < 1e-8 and solve["exponent"] < 0
    (bounds,) = theory.conditioning(name, 32, 1)
    assert bounds["lower_bound"] <= bounds["singular_value"] <= bounds["upper_bound"]
    assert theory.prefix(30)["fewest_solved_minus_iterations"] >= 0
    diagonal, _ = theory.rates("slow, weakly coupled", 32, quick=True)
    assert diagonal["linear_iterations"] > 0 and diagonal["largest_deviation"] < 1e-2
    assert max(diagonal["predicted"]) <= diagonal["bound"] * (1 + 1e-6) <= diagonal["product"] * (1 + 1e-5)


@pytest.mark.parametrize("quick", only_full(True))
def test_the_quick_variant_of_the_theory_has_every_kind_of_row(quick):
    found = list(theory.rows(quick))
    kinds = {"exponent", "conditioning", "prefix", "rate", "damping", "observer", "policy"}
    assert {row["what"] for row in found} == kinds
    observed = next(row for row in found if row["what"] == "observer")
    assert observed["success"] and observed["exponent"] < 0
    json.dumps(found, allow_nan=False)


def test_the_tables_of_the_pages_are_those_of_the_results():
    for part in ("theory", "examples", "packages"):
        content, _ = harness.read(part, "cpu")
        assert content["complete"] and not content["quick"]
    for path, page in pages.pages():
        assert path.read_text() == page, f"{path}: run `python -m benchmarks.pages`"
