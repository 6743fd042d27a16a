"""Base solvers as step maps. `make_step_map` chooses one.

- `_base.py`: the interface.
- `_explicit_runge_kutta.py`, `_diagonally_implicit.py`, `_multiple_shooting.py`, `_stateful.py`, `_generic.py`: one kind of
  base solver each.
- `_stage_equations.py`, `_simplified_newton.py`: the stages of diagonally implicit steps: exact, and for first guesses.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from ..._recurrence import AbstractParallelRootFinder, Ravel
from ._base import (
    AbstractEmbeddedSolver as AbstractEmbeddedSolver,
    AbstractStepMap as AbstractStepMap,
    StepOutput as StepOutput,
)
from ._diagonally_implicit import DiagonallyImplicitStep as DiagonallyImplicitStep
from ._explicit_runge_kutta import ExplicitRungeKuttaStep as ExplicitRungeKuttaStep, StepWithStages as StepWithStages
from ._generic import GenericStep as GenericStep, prepare
from ._multiple_shooting import (
    IntervalStep as IntervalStep,
    MultipleShooting as MultipleShooting,
    ShootingStep as ShootingStep,
)
from ._stateful import StatefulStep as StatefulStep
from ._trial import AbstractTrial as AbstractTrial, make_trial as make_trial


# `jax.vmap` of a draw from these generators gives other numbers than draws one by one: steps in parallel would follow
# another Brownian path than steps in sequence.
_UNSAFE_GENERATORS = ("rbg", "unsafe_rbg")
# The length of their keys as plain arrays.
_KEY_LENGTH = 4


def make_step_map(solver: dfx.AbstractSolver, terms, y0, args, root_finder, time_dtype=None) -> AbstractStepMap:
    """The fastest step map that makes exactly the steps of `solver`: its own, if it has a method `step_map`.

    An implicit base solver without tolerances takes them from the parallel `root_finder`. `time_dtype` is by default that
    of a Python float.

    **Raises:** `ValueError` for a solver that carries anything but floating-point numbers from step to step, and for random
    keys in `terms` or `args` whose numbers differ in a batch. `TypeError` if the solver's `step_map` returns anything but a
    step map.
    """
    for generator in map(_generator, jtu.tree_leaves((terms, args))):
        if generator in _UNSAFE_GENERATORS:
            raise ValueError(
                f"`diffeqsolve(..., solver=ParallelSolver(...))`: got a random key of the generator {generator!r}. "
                "All steps are made at once under `jax.vmap`, where this generator gives other numbers than step by step, "
                'so the path would differ. Use `jax.random.key(seed, impl="threefry2x32")`.'
            )
    if hasattr(type(solver), "step_map"):
        step_map = solver.step_map(terms, y0, args)  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(step_map, AbstractStepMap):
            raise TypeError(
                f"`{type(solver).__name__}.step_map(terms, y0, args)`: expected an instance of `AbstractStepMap`, got "
                f"`{step_map!r}`. See `parallel_diffrax.step_maps`."
            )
        return step_map
    time_dtype = jnp.result_type(float) if time_dtype is None else time_dtype
    if ExplicitRungeKuttaStep.supports(solver):
        return ExplicitRungeKuttaStep(solver, terms, args)
    # Other root finders do not know inner unknowns.
    if DiagonallyImplicitStep.supports(solver) and isinstance(root_finder, AbstractParallelRootFinder):
        return DiagonallyImplicitStep.make(solver, terms, y0, args, time_dtype)
    kind = StatefulStep if StatefulStep.supports(solver, terms, y0, args, time_dtype) else GenericStep
    return kind(prepare(solver, root_finder), terms, args)


def trace_step(solver: dfx.AbstractSolver, terms, y0, args, root_finder, time_dtype) -> int:
    """Traces a step and its derivative, without running them. `y0` may be anything that Diffrax accepts.

    **Returns:** the size of the state of the recurrence.

    **Raises:** whatever tracing raises, for example for a vector field without a forward-mode derivative.
    """

    def step(terms, t, y0, args):
        with jax.numpy_dtype_promotion("standard"):
            y0 = jtu.tree_map(lambda y: jnp.asarray(y, jnp.result_type(y, time_dtype)), y0)
        step_map = make_step_map(solver, terms, y0, args, root_finder, time_dtype)
        step_map, state = step_map.begin(t, y0, step_map.initial_solver_state(t, t, y0), False)
        ravel = Ravel(state)
        y = ravel.ravel(state)
        return jax.jvp(lambda y: ravel.ravel(step_map(t, t, ravel.unravel(y)).y1), (y,), (y,))

    y, _ = eqx.filter_eval_shape(step, terms, jax.ShapeDtypeStruct((), time_dtype), y0, args)
    return y.size


def _generator(leaf) -> str | None:
    """The generator of a random key; `None` for anything else."""
    if not isinstance(leaf, jax.Array):
        return None
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(leaf))
    # A key in the old format does not name its generator, so it is taken to be the default one.
    plain = leaf.dtype == jnp.uint32 and leaf.shape[-1:] == (_KEY_LENGTH,)
    return str(jax.config.jax_default_prng_impl) if plain else None  # pyright: ignore
