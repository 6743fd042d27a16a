"""Every solver of Diffrax makes its own steps in parallel, by the path that the table on the site says.

`python -m tests.test_solver_table` writes the table anew.
"""

import dataclasses
import functools
import inspect
import pathlib
import sys
import warnings

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx
from parallel_diffrax._ode._gaussian_elimination import GaussianElimination
from parallel_diffrax._ode._step_map import make_step_map

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, only_full, parallel_solver


PAGE = pathlib.Path(__file__).parent.parent / "docs" / "guides" / "solvers.md"
BEGIN, END = "<!-- solvers -->\n\n", "\n<!-- /solvers -->"
NUM_STEPS = 8
LEVY_AREAS = (dfx.BrownianIncrement, dfx.SpaceTimeLevyArea, dfx.SpaceTimeTimeLevyArea)
# Diffrax's own classes to derive solvers from are concrete to Python.
SOLVERS = sorted(
    (
        cls
        for name, cls in vars(dfx).items()
        if inspect.isclass(cls) and issubclass(cls, dfx.AbstractSolver) and not name.startswith("Abstract")
    ),
    key=lambda cls: cls.__name__,
)


class Tabulated(dfx.AbstractBrownianPath):
    """The increments of a Brownian path over the steps, looked up: a tree would be most of the time to compile."""

    increments: dfx.AbstractBrownianIncrement
    levy_area: type = eqx.field(static=True)
    t0: float = 0.0
    t1: float = 1.0

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        index = jnp.round(t0 * NUM_STEPS).astype(int)
        increment = jax.tree.map(lambda x: x[index], self.increments)
        return increment if use_levy else increment.W


@functools.cache
def tabulated(area):
    """Increments and Levy areas of independent steps, of the variances that those of Brownian motion have."""
    rng, dt = np.random.default_rng(1), 1 / NUM_STEPS
    variances = {"W": dt, "H": dt / 12, "K": dt / 720}
    parts = {field.name: variances[field.name] for field in dataclasses.fields(area) if field.name != "dt"}
    drawn = {name: jnp.asarray(rng.normal(0, variance**0.5, (NUM_STEPS, 2))) for name, variance in parts.items()}
    return area(dt=jnp.full(NUM_STEPS, dt), **drawn)


def brownian(cls):
    minimal = getattr(cls(), "minimal_levy_area", dfx.BrownianIncrement)
    area = next(a for a in LEVY_AREAS if issubclass(a, minimal))
    return Tabulated(tabulated(area), area)


def problem(cls):
    """Terms that suit a solver, and an initial state."""
    pair = (DRIVEN_Y0, DRIVEN_Y0 + 1)
    if issubclass(cls, dfx.AbstractFosterLangevinSRK):
        friction = {"gamma": 1.7, "u": 0.7}
        drift = dfx.UnderdampedLangevinDriftTerm(**friction, grad_f=lambda x, args: jnp.sin(x))
        return dfx.MultiTerm(drift, dfx.UnderdampedLangevinDiffusionTerm(**friction, bm=brownian(cls))), pair
    if cls is dfx.SemiImplicitEuler:
        return (dfx.ODETerm(lambda t, v, args: v), dfx.ODETerm(lambda t, x, args: -jnp.sin(x))), pair
    if cls.__name__.startswith(("KenCarp", "Sil")):
        return dfx.MultiTerm(DRIVEN, dfx.ODETerm(lambda t, y, args: -3 * y**3)), DRIVEN_Y0
    if issubclass(cls, (dfx.AbstractSRK, dfx.EulerHeun, dfx.ItoMilstein, dfx.StratonovichMilstein)):
        additive = issubclass(cls, dfx.AbstractSRK) and cls.tableau.is_additive_noise()

        def noise(t, y, args):
            return jnp.diag(0.3 + 0.1 * t * jnp.ones(2) if additive else 0.3 * jnp.cos(y))

        return dfx.MultiTerm(DRIVEN, dfx.ControlTerm(noise, brownian(cls))), DRIVEN_Y0
    return DRIVEN, DRIVEN_Y0


def instance(cls):
    return cls(dfx.Euler()) if cls is dfx.HalfSolver else cls()


def path(cls) -> str:
    """What the module of a step map says about itself; or that there is none."""
    terms, y0 = problem(cls)
    try:
        step_map = make_step_map(instance(cls), terms, y0, DRIVEN_ARGS, pdx.ParallelNewton())
    except (ValueError, TypeError):
        return "refused"
    return inspect.getmodule(type(step_map)).__doc__.splitlines()[0]


def table() -> str:
    rows = {}
    for cls in SOLVERS:
        rows.setdefault(path(cls), []).append(f"`{cls.__name__}`")
    lines = [f"| {', '.join(names)} | {how} |" for how, names in sorted(rows.items())]
    return "\n".join(["| solvers | how their steps are made |", "|---|---|", *lines, ""])


def test_the_table_on_the_site_is_what_the_package_does():
    text = PAGE.read_text()
    found = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert found == table(), "run `python -m tests.test_solver_table`"
    assert len(SOLVERS) > 25 and "refused" not in found


def solve_in_parallel(solver, terms, y0):
    """All steps from 0 to 1 as one window, without the loop of `diffeqsolve` around it."""
    parallel = parallel_solver(solver, NUM_STEPS, predictor=pdx.ConstantPredictor(), policy=pdx.policies.ParallelOnly())
    t0, t1 = jnp.array(0.0), jnp.array(1.0)

    @eqx.filter_jit
    def solve(terms, y0, args):
        state = parallel.init(terms, t0, t1, y0, args)
        y1, _, _, state, result = parallel.step(terms, t0, t1, y0, args, state, made_jump=False)
        return y1, state.statistics, result

    return solve(terms, y0, DRIVEN_ARGS)


def in_sequence(solver, terms, y0):
    """The same steps one after the other, as `diffeqsolve` makes them."""
    ts = jnp.linspace(0.0, 1.0, NUM_STEPS + 1)
    step = eqx.filter_jit(functools.partial(solver.step, made_jump=False))
    state = solver.init(terms, ts[0], ts[1], y0, DRIVEN_ARGS)
    for k in range(NUM_STEPS):
        y0, _, _, state, _ = step(terms, ts[k], ts[k + 1], y0, DRIVEN_ARGS, state)
    return y0


# They differ from those that are left in their coefficients alone.
SIMILAR = (
    *("KenCarp3", "KenCarp5", "Kvaerno3", "Kvaerno4", "ImplicitEuler", "Bosh3", "Dopri5", "Midpoint", "Ralston"),
    *("KenCarp4", "Dopri8", "ItoMilstein", "GeneralShARK", "SEA", "ShOULD", "SlowRK", "SPaRK"),
)


@pytest.mark.parametrize(
    "cls", [cls if cls.__name__ not in SIMILAR else only_full(cls)[0] for cls in SOLVERS], ids=lambda cls: cls.__name__
)
def test_every_solver_of_diffrax_makes_its_own_steps_in_parallel(cls):
    terms, y0 = problem(cls)
    solver = instance(cls)
    got, statistics, result = solve_in_parallel(solver, terms, y0)
    if isinstance(solver, dfx.AbstractImplicitSolver):
        newton = optx.Newton(rtol=1e-12, atol=1e-13, linear_solver=GaussianElimination())
        solver = eqx.tree_at(lambda s: s.root_finder, solver, newton)
    want = in_sequence(solver, terms, y0)
    assert result == dfx.RESULTS.successful
    assert int(statistics.parallel_steps) == NUM_STEPS
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
    sys.stdout.write(table())
