"""Writes the tables of `docs/theory.md` and of `docs/examples/` from the results of `theory`, `examples` and
`packages`.

    python -m benchmarks.pages

A table stands between two comments with its name. A test compares the pages with the results.
"""

import math
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from . import harness
from .theory import in_linear_range


DOCS = pathlib.Path(__file__).parent.parent / "docs"


def pages() -> Iterator[tuple[pathlib.Path, str]]:
    """Every page that has tables, and what it should contain."""
    yield _written(DOCS / "theory.md", tables(harness.read("theory", "cpu")[1]))
    found = [row for part in ("examples", "packages") for row in harness.read(part, "cpu")[1]]
    for name in dict.fromkeys(row["example"] for row in found):
        yield _written(
            DOCS / "examples" / f"{name}.md", {"cost": _cost_table([r for r in found if r["example"] == name])}
        )


def _cost_table(found: list[dict]) -> str:
    lines = [[row["what"], f"{row['ratio']:.1f}", f"{row['difference']:.0e}"] for row in found]
    return _markdown(["", "times as fast as Diffrax", "largest relative difference"], lines)


def tables(found: list[dict]) -> dict[str, str]:
    """The tables of `docs/theory.md`, by name."""
    of = lambda what: [row for row in found if row["what"] == what]
    return {
        "exponent": _exponent_table(of("exponent")),
        "conditioning": _conditioning_table(of("conditioning")),
        "rates": _rate_table(of("rate")),
        "damping": _damping_table(of("damping")),
        "flows": _flow_table(of("flow"), of("observer")),
        "policy": _policy_table(of("policy")),
    }


def _markdown(header: list[str], lines: list[list]) -> str:
    cells = [[x if isinstance(x, str) else harness.show(x) for x in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *cells])


def _exponent_table(found: list[dict]) -> str:
    lengths = sorted({row["N"] for row in found})
    members = dict.fromkeys((row["problem"], row["parameter"], row["value"]) for row in found)
    lines = []
    for number, (problem, parameter, value) in enumerate(members):
        if number % 2 == 1:
            mine = {row["N"]: row for row in found if (row["problem"], row["value"]) == (problem, value)}
            lines.append(
                [f"{problem}, {parameter} {value:g}", f"{mine[lengths[0]]['exponent']:.4f}"]
                + [str(mine[n]["iterations"]) + ("" if mine[n]["success"] else " (not solved)") for n in lengths]
            )
    return _markdown(["", "exponent per step", *(f"N = {n}" for n in lengths)], lines)


def _conditioning_table(found: list[dict]) -> str:
    lines = []
    for number, row in enumerate(found):
        if number % 3 == 0:
            values = [f"{row[key]:.1e}" for key in ("lower_bound", "singular_value", "upper_bound")]
            lines.append([f"{row['problem']}, {row['parameter']} {row['value']:g}", f"{row['exponent']:.4f}", *values])
    return _markdown(["", "exponent per step", "lower bound", "measured", "upper bound"], lines)


def _rate_table(found: list[dict]) -> str:
    lines = []
    for row in found:
        errors = np.array(row["errors"])
        solved = str(row["iterations"]) if errors[-1] < 1e-11 else f"more than {row['iterations']}"
        if "measured" not in row:
            orders = ", ".join(f"{order:.1f}" for order in row["orders"])
            lines.append([row["problem"], f"`{row['jacobian']}`", f"quadratic (orders {orders})", "", "", "", solved])
            continue
        linear = in_linear_range(errors)
        means = [_mean(np.array(row[key])[linear]) for key in ("measured", "predicted")]
        numbers = ["" if x is None else f"{x:.3g}" for x in (*means, row["bound"], row["product"])]
        lines.append([row["problem"], f"`{row['jacobian']}`", *numbers, solved])
    header = [
        "recurrence",
        "Jacobian",
        "measured rate",
        "predicted",
        "norm of M",
        "accuracy times stability",
        "iterations",
    ]
    return _markdown(header, lines)


def _mean(rates: np.ndarray) -> float | None:
    """The geometric mean."""
    return math.exp(np.mean(np.log(rates))) if rates.size else None


def _damping_table(found: list[dict]) -> str:
    lines = []
    for problem in dict.fromkeys(row["problem"] for row in found):
        mine, line = [row for row in found if row["problem"] == problem], []
        for row in mine:
            overflow, solved = row["first_overflow"], row["first_solved"]
            end = (
                f"overflow in {overflow}" if overflow is not None else f"solved in {solved}" if solved else "not solved"
            )
            line.append(f"{harness.show(row['largest_iterate'])}, {end}")
        lines.append([problem, mine[0]["largest_state"], *line])
    return _markdown(["", "solution", "Newton without safeguards", "`ParallelNewton()`", "`ELK()`"], lines)


def _flow_table(flows: list[dict], observers: list[dict]) -> str:
    by_name = {row["problem"]: row for row in observers}
    lines = []
    for row in flows:
        other = by_name[row["problem"]]
        work = f"{row['iterations']} ({row['attempts']}, {row['sequential_steps']})"
        lines.append(
            [row["problem"], f"{row['exponent']:.3f}", work, f"{other['exponent']:.3f}", str(other["iterations"])]
        )
    header = ["flow", "exponent", "`AdaptivePolicy`: iterations (segments, sequential steps)"]
    return _markdown([*header, "exponent of the observer", "Newton's iterations on it"], lines)


def _policy_table(found: list[dict]) -> str:
    keys = ("attempts", "iterations", "sequential_steps", "predictor_steps")
    lines = [
        [
            f"{row['speed']:g}",
            f"{row['exponent_per_step']:.5f}",
            *(str(row[key]) for key in keys),
            row["steps_over_depth"],
        ]
        for row in found
    ]
    header = ["speed", "exponent per step", "segments attempted", "iterations", "sequential steps", "steps of guesses"]
    return _markdown([*header, "steps / depth"], lines)


def _written(path: pathlib.Path, named: dict[str, str]) -> tuple[pathlib.Path, str]:
    """The page with these tables in their places."""
    page = path.read_text()
    for name, table in named.items():
        places = list(re.finditer(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", page, flags=re.DOTALL))
        if len(places) != 1:
            raise ValueError(f"{path}: expected one place for the table {name}, found {len(places)}")
        (place,) = places
        page = page[: place.end(1)] + f"\n{table}\n\n" + page[place.start(2) :]
    return path, page


if __name__ == "__main__":
    for path, page in pages():
        path.write_text(page)
