"""`diagnostics.plot` draws what a solve did: every segment, every step in sequence, every window, and nothing else."""

import dataclasses
import pathlib
import sys
import tomllib

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import matplotlib.figure
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, lorenz, parallel_solver


# Chaotic enough, from so poor a guess, that some segments are solved in parallel and some steps are made in sequence.
TERM = dfx.ODETerm(lambda t, y, speed: speed * lorenz(t, y))
SOLVER = parallel_solver(
    dfx.Bosh3(), 256, predictor=pdx.ConstantPredictor(), policy=pdx.AdaptivePolicy(min_steps=16), root_find_max_steps=12
)
DENSE = dfx.SaveAt(t1=True, dense=True, solver_state=True)


@jax.jit
def chaotic(speed):
    return dfx.diffeqsolve(
        TERM, SOLVER, 0.0, 2.0, 2.0 / 512, jnp.ones(3), speed, stepsize_controller=pdx.Windows(), saveat=DENSE, max_steps=2
    )  # fmt: skip


def drawn(figure):
    """The axes, and the spans over which the last one is shaded, by colour."""
    axes, colours = figure.axes, {}
    for patch in axes[2].patches:
        colours.setdefault(patch.get_facecolor()[:3], []).append((patch.get_x(), patch.get_x() + patch.get_width()))
    return axes, colours


def test_segments_windows_and_steps_in_sequence_are_drawn_where_they_are():
    sol = chaotic(jnp.array(4.0))
    statistics, layout = pdx.statistics(sol), pdx.refine(sol).stats["layout"]
    solved, iterations = layout.segments.num_solved, layout.segments.iterations
    attempts, sequential = int(statistics.attempts), int(statistics.sequential_steps)
    assert attempts > 4 and 0 < sequential < 512
    # The list agrees with the sums.
    assert int(np.sum(np.asarray(iterations) > 0)) == attempts
    assert (int(np.sum(solved)), int(np.sum(iterations))) == (512 - sequential, int(statistics.iterations))
    axes, colours = drawn(pdx.diagnostics.plot(sol))
    assert len(axes) == 4  # with the scale of growth
    # All time is shaded once, in sequence as long as there are such steps.
    spans = sorted(span for spans in colours.values() for span in spans)
    np.testing.assert_allclose([a for a, _ in spans[1:]], [b for _, b in spans[:-1]])
    np.testing.assert_allclose([spans[0][0], spans[-1][1]], [0.0, 2.0])
    orange = max(colours, key=lambda colour: colour[0])
    assert sum(b - a for a, b in colours[orange]) == pytest.approx(sequential * 2.0 / 512)
    # A bar for each segment and each run in sequence, a cross for each attempt in vain, one line between two windows.
    crosses = [line for line in axes[2].lines if line.get_marker() == "x"]
    assert len(crosses) == int(np.sum((np.asarray(iterations) > 0) & (np.asarray(solved) == 0)))
    dotted = [line for line in axes[2].lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [1.0]
    assert len(axes[2].lines) == len(spans) + len(crosses) + len(dotted)
    assert len(axes[3].lines) == int(np.sum(np.asarray(solved) > 0))
    assert f"{512 - sequential} steps in parallel, {sequential} in sequence" in axes[0].get_title()


def test_the_trajectory_and_the_lengths_of_adaptive_steps_are_drawn():
    controller = dfx.PIDController(rtol=1e-4, atol=1e-6)
    sol = pdx.diffeqsolve(
        DRIVEN, dfx.Bosh3(), 2.0, 0.0, None, DRIVEN_Y0, DRIVEN_ARGS, stepsize_controller=controller,
        saveat=dfx.SaveAt(t1=True, dense=True), max_steps=64,
    )  # fmt: skip
    count = int(pdx.statistics(sol).sequential_steps)
    figure = matplotlib.figure.Figure()
    assert pdx.diagnostics.plot(sol, components=[1], figure=figure) is figure
    (above, middle, _), colours = drawn(figure)
    (curve,) = [line for line in above.lines if len(line.get_xdata()) > 2]
    ts = curve.get_xdata()
    # A few large steps are drawn as curves, with as many points within each.
    assert len(ts) > 400 and (len(ts) - 1) % count == 0 and ts[0] == 2.0 and ts[-1] == 0.0
    np.testing.assert_allclose(curve.get_ydata(), jax.vmap(sol.evaluate)(jnp.asarray(ts))[:, 1])
    (stairs,) = [patch for patch in middle.patches if hasattr(patch, "get_data")]
    np.testing.assert_allclose(stairs.get_data().values, -np.diff(ts[:: (len(ts) - 1) // count]))
    assert [len(spans) for spans in colours.values()] == [1]
    figure.canvas.draw()


def test_segments_that_are_not_listed_are_said_to_be_unknown():
    sol = pdx.refine(chaotic(jnp.array(4.0)))
    layout = sol.stats["layout"]
    # As if the list of the first window were full after its first segment.
    full = jtu.tree_map(lambda x: x.at[0].set(x[0, 0]), layout.segments)
    sol = dataclasses.replace(sol, stats=sol.stats | {"layout": dataclasses.replace(layout, segments=full)})
    middle = pdx.diagnostics.plot(sol).axes[1]
    assert "not listed" in [text.get_text() for text in middle.get_legend().get_texts()]


def test_what_cannot_be_drawn_is_refused_with_a_reason(monkeypatch):
    saveat = dfx.SaveAt(t1=True)
    sol = pdx.diffeqsolve(DRIVEN, dfx.Euler(), 0.0, 1.0, 0.25, DRIVEN_Y0, DRIVEN_ARGS, saveat=saveat)
    with pytest.raises(ValueError, match=r"Pass `saveat=SaveAt\(t1=True, dense=True\)`"):
        pdx.diagnostics.plot(sol)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'parallel_diffrax\[(\w+)\]'") as caught:
        pdx.diagnostics.plot(sol)
    # The extra that it names has Matplotlib.
    name = str(caught.value).split("[")[1].split("]")[0]
    project = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert any(package.startswith("matplotlib") for package in project["optional-dependencies"][name])
