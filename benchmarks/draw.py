"""Draws the pictures of the README and the site from the results.

    python -m benchmarks.draw [--platform gpu|cpu] [--results FOLDER] [PICTURE ...]

Reads `results/<part>_<platform>.json` and writes `results/<picture>_<platform>.png`. If results are missing, the output
names the picture and the exit status is 1. A row that lacks an entry to draw is an error. Rows that failed are left out,
and the output says how many. The pictures of `theory` are drawn only if they are named, without the platform in their names:
iterations depend on it only through rounding.
"""

import argparse
import functools
import pathlib
import sys

import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from parallel_diffrax.diagnostics import CostEstimate, estimate_cost


matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import harness
from .regimes import FHN


jax.config.update("jax_enable_x64", True)

Rows = list[dict]
PARALLEL, DIFFRAX, VECTORS, SCALARS = "C0", "C1", "C2", "C3"


class Results:
    """The results in one folder, for one platform."""

    def __init__(self, folder: pathlib.Path, platform: str):
        self.folder, self.platform = folder, platform

    def rows(self, part: str) -> Rows:
        """The rows of a part that did not fail. Prints the device, the version of JAX and what is incomplete."""
        content, rows = harness.read(part, self.platform, self.folder)
        about = f"{content['environment']['device']}, jax {content['environment']['packages']['jax']}"
        left_out = len(content["rows"]) - len(rows)
        notes = [about] + ([f"{left_out} rows failed"] if left_out else [])
        notes += (["quick"] if content["quick"] else []) + ([] if content["complete"] else ["incomplete"])
        print(f"{part}: {', '.join(notes)}")
        return rows


def problems(rows: Rows) -> list[str]:
    """The names of the problems, in the order of the rows."""
    return list(dict.fromkeys(row["problem"] for row in rows))


def finish(*places, legend: int | None = 8):
    """Draws the grid, and the legend in this size of font."""
    for axes in places:
        axes.grid(alpha=0.3)
        if legend is not None:
            axes.legend(fontsize=legend)


def steps(results: Results):
    """Time against the number of steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rows = [row for row in results.rows("steps") if not row["what"].endswith("summary")]
    solves = [row for row in rows if row["what"] == "solve"]

    def curve(axes, chosen, label, color, marker="o"):
        best = {}
        for row in chosen:
            best[row["N"]] = min(row["median_ms"], best.get(row["N"], float("inf")))
        xs = sorted(best)
        axes.loglog(xs, [best[n] for n in xs], marker + "-", color=color, label=label, markersize=4)

    curve(left, [row for row in solves if row["method"] == "parallel"], "parallel", PARALLEL)
    base = [row for row in solves if row["method"] == "diffrax"]
    curve(left, [row for row in base if not row["extrapolated"]], "sequential Diffrax", DIFFRAX)
    far = sorted((row["N"], row["median_ms"]) for row in base if row["extrapolated"])
    if far:
        near = max((row["N"], row["median_ms"]) for row in base if not row["extrapolated"])
        left.loglog(*zip(near, *far), ":", color=DIFFRAX, label="extrapolated")
    for form, color in (("vectors", VECTORS), ("scalars", SCALARS)):
        found = [row for row in solves if row["method"] == "scan" and row["form"] == form]
        curve(left, found, f"lax.scan by hand, {form}", color)
    left.set(xlabel="steps", ylabel="ms", title="FitzHugh-Nagumo by Tsit5: one solve")
    gradients = [row for row in rows if row["what"] == "gradient"]
    for k, method in enumerate(dict.fromkeys(row["method"] for row in gradients)):
        color = DIFFRAX if method == "diffrax" else ("C0", "C4")[k % 2]
        label = "sequential Diffrax" if method == "diffrax" else method
        curve(right, [row for row in gradients if row["method"] == method], label, color)
    right.set(xlabel="steps", ylabel="ms", title="the gradient of a loss on the end state")
    finish(left, right)
    return figure


def precision(results: Results):
    """Time against error on every problem."""
    runs = [row for row in results.rows("precision") if row["what"] == "run"]
    names = problems(runs)
    height = -(-len(names) // 4)
    figure, axes = plt.subplots(
        height, min(4, len(names)), figsize=(13, 3.2 * height), layout="constrained", squeeze=False
    )
    colors = {"parallel": "C0", "Tsit5": "C1", "Dopri8": "C2", "Kvaerno5": "C3"}
    for name, place in zip(names, axes.flat):
        mine = [row for row in runs if row["problem"] == name]
        for method in dict.fromkeys(row["method"] for row in mine):
            found = [row for row in mine if row["method"] == method and row["success"] and row["error"] > 0]
            points = sorted((row["error"], row["median_ms"]) for row in found)
            label = "in parallel" if method == "parallel" else f"{method}, adaptive"
            if points:
                place.loglog(*zip(*points), "o-", color=colors[method], label=label, markersize=4)
            else:
                place.plot([], [], "x", color=colors[method], label=f"{label}: no success")
        place.set(title=name, xlabel="error at the end", ylabel="ms")
        place.title.set_fontsize(9)
        place.invert_xaxis()
        finish(place, legend=7)
    return figure


def limits(results: Results):
    """Where parallel-in-time stops paying: batch size and dimension."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    batch = results.rows("batch")
    for k, n in enumerate(sorted({row["N"] for row in batch})):
        rows = sorted((row for row in batch if row["N"] == n), key=lambda row: row["batch"])
        ratios(left, rows, "batch", f"N = {n}, ", f"C{2 * k}", f"C{2 * k + 1}")
    left.set(xlabel="batch size", title="speed-up against batch size")
    rows = sorted(results.rows("dimension"), key=lambda row: row["D"])
    ratios(right, rows, "D", f"N = {rows[0]['N']}, ", "C0", "C1")
    right.set(xlabel="size of the state", title="speed-up against dimension")
    return figure


def ratios(axes, rows: Rows, key: str, label: str, color: str, other: str):
    """Draws the speed-up of the parallel solve over Diffrax and over the loop by hand, with a line at 1."""
    xs = [row[key] for row in rows]
    axes.loglog(xs, [row["over_diffrax"] for row in rows], "o-", color=color, label=f"{label}over Diffrax")
    axes.loglog(xs, [row["over_scan"] for row in rows], "s--", color=other, label=f"{label}over lax.scan by hand")
    axes.axhline(1, color="black", lw=0.8)
    axes.set_ylabel("times faster")
    finish(axes)


def scans(results: Results):
    """Scans against the bandwidth floor, and the methods of the family."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rows = [row for row in results.rows("scans") if row["what"] == "scan" and "left_out" not in row]
    cases = list(dict.fromkeys((row["D"], row["N"]) for row in rows))
    names = list(dict.fromkeys(row["scan"] for row in rows))
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        found = {(row["D"], row["N"]): row["over_floor"] for row in rows if row["scan"] == name}
        at = [i + k * width for i, case in enumerate(cases) if case in found]
        left.bar(at, [found[case] for case in cases if case in found], width, label=name)
    left.axhline(8, color="black", lw=0.8, ls=":")
    left.set_xticks([i + 0.4 - width / 2 for i in range(len(cases))], [f"D = {d}\nN = {n}" for d, n in cases])
    left.set(yscale="log", ylabel="time over the bandwidth floor", title="affine scans, float32 (dotted: 8)")
    left.legend(fontsize=8)
    rows = results.rows("methods")
    labels = [f"{row['problem']}, {row['method']}" for row in rows]
    colors = ["C1" if row["method"] == "scan" else "C0" if row["success"] else "C7" for row in rows]
    right.barh(labels[::-1], [row["median_ms"] for row in rows][::-1], color=colors[::-1])
    right.set(xscale="log", xlabel="ms (grey: not solved in 200 iterations)", title="from a constant guess")
    return figure


@functools.cache
def step_of(problem: str) -> tuple[int, float | None]:
    """The size of the state, and the scalar operations of a step in a kernel: `None` if it is too large for one."""
    if problem == "neural ODE":
        return 16, None
    y0 = jnp.asarray(FHN.y0)
    found = estimate_cost(FHN.term, dfx.Tsit5(), 0.0, 1.0, y0, FHN.args, num_steps=1)
    return found.state_size, found.kernel_operations


def chosen(row: dict, platform: str) -> str:
    """How the default policy makes the steps of a cell: by the same estimates."""
    if platform == "cpu" or row.get("steps") is None:
        return "in sequence"
    return choice_of(row["steps"], row["batch"], *step_of(row["problem"]))


def choice_of(num_steps: int, batch: int, size: int, operations: float | None) -> str:
    return CostEstimate.of(num_steps, size, batch, operations, 8).choice


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 99.5 else f"{x:.2g}"


def regimes(results: Results):
    """The map of regimes: the default beside Diffrax and beside the best alternative."""
    rows = results.rows("regimes")

    def problem(row):
        if row.get("steps") is not None:
            return f"{row['problem']}\n{row['steps']} constant steps"
        what = f", {row['outputs']} outputs" if row.get("outputs") else ", an event" if row.get("event") else ""
        return f"{row['problem']}\nadaptive, {row['tolerance']:g}{what}"

    names = list(dict.fromkeys(map(problem, rows)))
    kinds = sorted({(row["gradient"], row["batch"]) for row in rows})
    ratio = np.full((len(names), len(kinds)), np.nan)
    figure, axes = plt.subplots(figsize=(1.9 + 0.92 * len(kinds), 1.2 + 0.6 * len(names)), layout="constrained")
    for row in rows:
        i, j = names.index(problem(row)), kinds.index((row["gradient"], row["batch"]))
        ratio[i, j] = row["ratio"]
        text = f"{number(row['ratio'])}\nbest {number(row['to_best'])}\n{chosen(row, results.platform)}"
        strong = abs(np.log10(row["ratio"])) > 1.2
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if strong else "black")
    colors = plt.get_cmap("RdBu").with_extremes(bad="0.94")
    axes.imshow(np.ma.masked_invalid(np.log10(ratio)), cmap=colors, vmin=-2.2, vmax=2.2, aspect="auto")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xticks(
        range(len(kinds)),
        [f"{'gradient' if gradient else 'solve'}\nbatch {batch}" for gradient, batch in kinds],
        fontsize=8,
    )
    figure.suptitle(
        "times faster than Diffrax; than the best alternative;\nhow steps are made (grey: not measured)", fontsize=9
    )
    return figure


def choice(results: Results):
    """Where the default policy solves in parallel on a GPU, by its estimates, with the measured cells in it."""
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    counts = np.unique(np.logspace(1, 6, 300).astype(int)).tolist()
    batches = np.unique(np.logspace(0, 4, 400).astype(int)).tolist()
    lines = {"2 numbers, a step in a kernel (FitzHugh-Nagumo by Tsit5)": step_of("FitzHugh-Nagumo")}
    lines |= {f"{size} numbers, a step by XLA": (size, None) for size in (2, 16, 64)}
    for k, (label, step) in enumerate(lines.items()):
        most = lambda n, step=step: max((b for b in batches if choice_of(n, b, *step) == "in parallel"), default=np.nan)
        axes.loglog(counts, [most(n) for n in counts], color=f"C{k}", label=label)
    for row in results.rows("regimes"):
        if row["problem"] == "FitzHugh-Nagumo" and row.get("steps") is not None and not row["gradient"]:
            marker = "o" if chosen(row, results.platform) == "in parallel" else "s"
            axes.plot(row["steps"], row["batch"], marker, color="C0", markersize=6)
            axes.annotate(f" {row['ratio']:.0f}", (row["steps"], row["batch"]), fontsize=8)
    axes.plot([], [], "o", color="C0", label="measured on FitzHugh-Nagumo, in parallel: times faster than Diffrax")
    axes.plot([], [], "s", color="C0", label="measured on FitzHugh-Nagumo, in sequence: times faster than Diffrax")
    axes.set(
        xlabel="constant steps",
        ylabel="batch",
        ylim=(0.7, 3e5),
        title="constant steps on a GPU: in parallel below and right of a line, in sequence elsewhere",
    )
    axes.legend(fontsize=8, loc="upper right")
    axes.grid(alpha=0.3)
    return figure


def theory_exponent(results: Results):
    """Newton's iterations against the exponent, and the conditioning of the linear system between its bounds."""
    found = [row for row in results.rows("theory") if row["what"] in ("exponent", "conditioning")]
    names = problems([row for row in found if row["what"] == "exponent"])
    figure, axes = plt.subplots(2, len(names), figsize=(4.2 * len(names), 7), layout="constrained", squeeze=False)
    for name, (top, bottom) in zip(names, axes.T):
        mine = [row for row in found if row["problem"] == name]
        solves = [row for row in mine if row["what"] == "exponent"]
        for k, n in enumerate(sorted({row["N"] for row in solves})):
            points = sorted((row["exponent"], row["iterations"]) for row in solves if row["N"] == n)
            top.semilogy(*zip(*points), "o-", color=f"C{k}", markersize=4, lw=1, label=f"N = {n}")
            top.axhline(n, color=f"C{k}", lw=0.8, ls=":")
        top.set(title=name, ylabel="iterations (dotted: N)")
        bounds = sorted((row for row in mine if row["what"] == "conditioning"), key=lambda row: row["exponent"])
        xs = [row["exponent"] for row in bounds]
        bottom.fill_between(
            xs,
            [row["lower_bound"] for row in bounds],
            [row["upper_bound"] for row in bounds],
            alpha=0.2,
            label="bounds",
        )
        bottom.semilogy(xs, [row["singular_value"] for row in bounds], "o-", markersize=4, lw=1, label="measured")
        bottom.set(
            xlabel="largest Lyapunov exponent per step", ylabel=f"smallest singular value of L, N = {bounds[0]['N']}"
        )
        for place in (top, bottom):
            place.axvline(0, color="black", lw=0.8)
        finish(top, bottom)
    return figure


def theory_rates(results: Results):
    """Errors of every approximate Jacobian, measured and predicted; measured rates against predicted ones."""
    found = [row for row in results.rows("theory") if row["what"] == "rate"]
    names = problems(found)
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(4.2 * (len(names) + 1), 4.2), layout="constrained")
    for name, place in zip(names, axes):
        for k, row in enumerate([row for row in found if row["problem"] == name]):
            errors = row["errors"][:31]
            place.semilogy(errors, "o-", color=f"C{k}", markersize=3, lw=1, label=row["jacobian"])
            if "predicted" in row:
                predicted = [rate * error for rate, error in zip(row["predicted"], errors)]
                place.semilogy(range(1, len(predicted) + 1), predicted, "k:", lw=1)
        place.set(title=name, xlabel="iteration", ylabel="error (dotted: predicted)", ylim=(1e-12, 1e4))
    finish(*axes[:-1], legend=None)
    axes[0].legend(fontsize=7)
    last = axes[-1]
    for name, marker in zip(names, "os^"):
        for k, row in enumerate([row for row in found if row["problem"] == name]):
            if "predicted" in row:
                label = row["jacobian"] if name == names[0] else None
                last.loglog(row["predicted"], row["measured"], marker, color=f"C{k}", markersize=4, label=label)
    ends = [1e-3, 1e2]
    last.loglog(ends, ends, "k", lw=0.8)
    last.set(xlabel="predicted rate", ylabel="measured rate", title="every iteration")
    finish(last, legend=7)
    return figure


def theory_damping(results: Results):
    """The largest number in every iterate, with and without damping."""
    found = [row for row in results.rows("theory") if row["what"] == "damping"]
    names = problems(found)
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.8), layout="constrained", squeeze=False)
    for name, place in zip(names, axes.flat):
        mine = [row for row in found if row["problem"] == name]
        for k, row in enumerate(mine):
            ys = [value for value in row["largest"] if value is not None]
            place.semilogy(ys, "o-", color=f"C{k}", markersize=3, lw=1, label=row["method"])
            if row["first_overflow"] is not None:
                place.plot(len(ys) - 1, ys[-1], "x", color=f"C{k}", markersize=12, mew=2, label="then overflow")
            if row["first_solved"] is not None:
                place.axvline(row["first_solved"], color=f"C{k}", lw=0.8, ls=":")
        place.axhline(mine[0]["largest_state"], color="black", lw=0.8)
        place.set(title=name, xlabel="iteration (dotted: solved)", ylabel="largest number (line: solution)")
        finish(place, legend=7)
    return figure


def theory_policy(results: Results):
    """What `AdaptivePolicy` does as the exponent per step grows."""
    found = sorted(
        (row for row in results.rows("theory") if row["what"] == "policy"), key=lambda row: row["exponent_per_step"]
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    xs, n = [row["exponent_per_step"] for row in found], found[0]["N"]
    for key, label in (
        ("attempts", "attempts"),
        ("iterations", "iterations"),
        ("sequential_steps", "sequential steps"),
    ):
        left.plot(xs, [row[key] for row in found], "o-", markersize=4, lw=1, label=label)
    left.axhline(n, color="black", lw=0.8, ls=":", label="all steps")
    left.set(
        xscale="log", yscale="symlog", ylim=(0, 2 * n), xlabel="exponent per step", title="Lorenz-63 at growing speed"
    )
    right.loglog(xs, [row["steps_over_depth"] for row in found], "o-", markersize=4, lw=1)
    right.axhline(1, color="black", lw=0.8)
    right.set(xlabel="exponent per step", ylabel="steps / depth", title="how much shorter the policy makes it")
    finish(left)
    finish(right, legend=None)
    return figure


PICTURES = {draw.__name__: draw for draw in (steps, precision, limits, scans, regimes, choice)}
THEORY = {draw.__name__: draw for draw in (theory_exponent, theory_rates, theory_damping, theory_policy)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = PICTURES | THEORY
    help_text = f"any of {', '.join(known)}; default: {', '.join(PICTURES)}"
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=help_text)
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--results", type=pathlib.Path, default=harness.RESULTS, help="folder of results and pictures")
    options = parser.parse_args()
    unknown = set(options.pictures) - set(known)
    if unknown:
        parser.error(f"unknown pictures: {', '.join(sorted(unknown))}")
    missing = []
    for name in options.pictures or PICTURES:
        try:
            figure = known[name](Results(options.results, options.platform))
        except FileNotFoundError as error:
            missing.append(f"{name}: {error}")
            continue
        file = name if name in THEORY else f"{name}_{options.platform}"
        path = options.results / f"{file}.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        print(path)
    for message in missing:
        print(f"!! not drawn: {message}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
