"""A picture of a solve: the trajectory, and how its steps were made."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._refine import LAYOUT, Layout, refine
from ._statistics import statistics


# The most curves that are drawn if the user says nothing, the most steps of each, and the fewest points: large steps are
# drawn as the curves that they are.
_CURVES, _STEPS, _POINTS = 6, 4000, 400
# Two colours for neighbouring segments in parallel, one for steps in sequence, one for those that were not listed.
_PARALLEL, _SEQUENTIAL, _UNLISTED = ("#4c72b0", "#8fa9d6"), "#dd8452", "#cccccc"


class Run(NamedTuple):
    """Neighbouring fine steps, `start` to before `stop`, that were made in the same way: in parallel, in one attempt of
    `iterations` iterations, over which perturbations grew by the logarithm `growth`; sequentially, if `iterations` is zero;
    unknown how, if it is `None`. An attempt that solved nothing is a run without steps."""

    start: int
    stop: int
    iterations: int | None
    growth: float


def plot(sol: dfx.Solution, *, components: Sequence[int] | None = None, figure: Any = None):
    """Draws a solve: its trajectory, where windows and segments lie, which steps were made in parallel and which in
    sequence, the length of every step, and the iterations and the growth of perturbations of every segment.

    ```python
    sol = pdx.diffeqsolve(term, solver, t0, t1, dt0, y0, saveat=diffrax.SaveAt(t1=True, dense=True))
    pdx.diagnostics.plot(sol).savefig("solve.png")
    ```

    **Arguments:**

    - `sol`: the solution of `parallel_diffrax.diffeqsolve(..., saveat=SaveAt(dense=True))`, or of Diffrax's own function
        with a `ParallelSolver`. With `SaveAt(..., solver_state=True)` there, the title has the statistics.
    - `components`: the components of the raveled state to draw, by default the first six. Of complex ones, the real part.
    - `figure`: a `matplotlib.figure.Figure` to draw on, by default a new one that no window shows.

    **Returns:** the figure, with three axes: the trajectory, the lengths of the steps, and the iterations, with a second
    scale for the growth. Segments in parallel are shaded in blue, steps in sequence in orange. A dotted line marks the end
    of a window, a cross an attempt that solved nothing. How steps were made after the first 64 segments of a window is not
    recorded, and they are grey. After an event, the whole step in which it occurred is drawn.

    **Cost:** an evaluation of the dense output at the ends of up to 4000 steps, or within fewer than 400 steps.

    **Raises:** `ImportError` without Matplotlib; `ValueError` if `sol` has no dense output, is of another solver, or is a
    batch; `TypeError` if it is not a `diffrax.Solution`.
    """
    call = "`diagnostics.plot(sol)`"
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(f"{call} needs Matplotlib: `pip install 'parallel_diffrax[examples]'`.") from error
    if not isinstance(sol, dfx.Solution):
        raise TypeError(f"{call}: expected the solution of `diffeqsolve`, got {type(sol).__name__}.")
    if sol.interpolation is None:
        raise ValueError(f"{call}: the solution has no dense output. Pass `saveat=SaveAt(t1=True, dense=True)`.")
    if LAYOUT not in sol.stats:
        sol = refine(sol)
    layout: Layout = sol.stats[LAYOUT]
    if np.ndim(layout.size) > 0:
        raise ValueError(
            f"{call}: got a batch of solutions, of shape {np.shape(layout.size)}. Draw one of its members."
        )
    interpolation: Any = sol.interpolation
    size, windows = int(interpolation.ts_size), np.asarray(layout.ts)[: int(np.asarray(layout.size))]
    times = np.asarray(interpolation.ts)[:size]
    runs = list(runs_of(times, windows, layout))
    direction = float(interpolation.direction)

    figure = Figure(figsize=(9, 7), layout="constrained") if figure is None else figure
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1.4])
    shown = times[np.unique(np.linspace(0, size - 1, min(size, _STEPS)).astype(int))]
    within = -(-_POINTS // max(len(shown) - 1, 1))
    shown = np.interp(np.arange((len(shown) - 1) * within + 1) / within, np.arange(len(shown)), shown)
    states = _states(sol, jnp.asarray(direction * shown))
    components = range(min(states.shape[1], _CURVES)) if components is None else components
    for k in components:
        above.plot(direction * shown, states[:, k], lw=1, label=f"{k}")
    above.legend(title="component", fontsize=8, loc="upper right")
    above.set(ylabel="state", title=_title(sol))

    lengths = np.diff(times)
    middle.stairs(lengths, direction * times, baseline=None, color="black", lw=0.8)
    middle.set(ylabel="length of a step", yscale="log")
    if len(lengths) > 0:
        # Equal lengths differ by rounding.
        middle.set_ylim(0.7 * lengths.min(), 1.4 * lengths.max())

    second = below.twinx() if any(run.iterations and np.isfinite(run.growth) for run in runs) else None
    level = 0.0
    for number, run in enumerate(runs):
        begin, end = direction * times[run.start], direction * times[run.stop]
        if run.start == run.stop:
            below.plot(begin, run.iterations, "x", color="black", markersize=5)
            continue
        color = _PARALLEL[number % 2] if run.iterations else _SEQUENTIAL if run.iterations == 0 else _UNLISTED
        for axes in (above, middle, below):
            axes.axvspan(begin, end, color=color, alpha=0.25, lw=0)
        below.plot([begin, end], [run.iterations or 0] * 2, color=color, lw=3, solid_capstyle="butt")
        if second is not None and run.iterations and np.isfinite(run.growth):
            second.plot([begin, end], [level, level + run.growth], color="black", lw=1)
            level += run.growth
    for end in windows[1:-1]:
        for axes in (above, middle, below):
            axes.axvline(direction * end, color="black", lw=0.6, ls=":")
    below.set(xlabel="time", ylabel="iterations")
    below.set_ylim(0, max([run.iterations or 0 for run in runs] + [1]) * 1.15)
    below.yaxis.set_major_locator(MaxNLocator(integer=True))
    if second is not None:
        second.set_ylabel("log of growth (black)")
    names = {_PARALLEL[0]: "in parallel", _SEQUENTIAL: "in sequence", _UNLISTED: "not listed"}
    made = [run for run in runs if run.stop > run.start]
    kinds = [_PARALLEL[0] if r.iterations else _SEQUENTIAL if r.iterations == 0 else _UNLISTED for r in made]
    handles = [Patch(color=color, alpha=0.4, label=label) for color, label in names.items() if color in kinds]
    middle.legend(handles=handles, fontsize=8, loc="upper right")
    return figure


def _title(sol: dfx.Solution) -> str:
    """What the statistics say, if there are any."""
    try:
        found = statistics(sol)
    except (TypeError, ValueError):
        return ""
    parallel, sequential = int(found.parallel_steps), int(found.sequential_steps)
    title = f"{parallel} steps in parallel, {sequential} in sequence"
    if (rejected := int(found.rejected_steps)) > 0:
        title += f", {rejected} rejected"
    if (attempts := int(found.attempts)) > 0:
        title += f"; {attempts} attempts, {int(found.iterations)} iterations"
    return title


def _states(sol: dfx.Solution, ts) -> np.ndarray:
    """The raveled states at these times, one in a row."""
    ys = jax.vmap(sol.evaluate)(ts)
    columns = [np.real(np.asarray(y)).reshape(len(ts), -1) for y in jtu.tree_leaves(ys)]
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(ts), 0))


def runs_of(times: np.ndarray, windows: np.ndarray, layout: Layout):
    """Yields the runs of a solve with fine steps that end at `times`, in windows that end at `windows`."""
    for index in range(len(windows) - 1):
        first, last = (int(np.searchsorted(times, t)) for t in windows[index : index + 2])
        done = first
        if layout.segments is not None:
            rows = [np.asarray(x)[index] for x in jtu.tree_leaves(layout.segments)]
            for start, solved, iterations, growth in zip(*rows):
                begin, end = (min(first + int(x), last) for x in (start, start + solved))
                if iterations == 0:
                    # The list has ended, or there was nothing to do.
                    continue
                if begin > done:
                    yield Run(done, begin, 0, np.nan)
                yield Run(begin, end, int(iterations), float(growth))
                done = end
            if done < last and rows[2][-1] > 0:
                yield Run(done, last, None, np.nan)
                done = last
        if done < last:
            yield Run(done, last, 0, np.nan)
