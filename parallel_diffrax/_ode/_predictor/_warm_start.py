"""The trajectory of the previous solve as the first guess."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._recurrence import Prediction
from ..._scan import check_integer
from ._assessment import assess, evaluate_unless, GOOD
from ._base import AbstractPredictor, WindowGuess
from ._coarse import CoarsePredictor


class WarmStart(AbstractPredictor):
    """Starts from the trajectory of the previous solve, which Diffrax hands on as `solver_state`.

    Use it for problems that change little from solve to solve: the same times and number of steps, nearly the same
    parameters and initial state. A training loop then converges in one or two iterations, mostly with no step in sequence.
    Like any guess it is for steps that are solved in parallel: by hand, on every device, with `AdaptivePolicy()`.

    ```python
    solver = pdx.ParallelSolver(
        diffrax.Tsit5(), num_steps=4096, predictor=pdx.WarmStart(), policy=pdx.AdaptivePolicy()
    )
    state = solver.init(term, t0, t1, y0, args)  # no trajectory yet; made here so that every solve is given a state
    for _ in range(100):
        sol = diffrax.diffeqsolve(
            term, solver, t0, t1, dt0, y0, args, saveat=diffrax.SaveAt(ts=ts, solver_state=True), solver_state=state
        )
        state = sol.solver_state
        ...
    ```

    In minibatch training every member of the data set needs its own state. Make all states by
    `state = jax.vmap(lambda y0: solver.init(term, t0, t1, y0, args))(y0s)`, and give
    `jax.tree.map(lambda x: x[members], state)` to the solve of a minibatch.

    A trajectory can do no harm. It is used only if it is finite and as good as a coarse guess has to be: the sum of the
    defects that it leaves in the new equations is at most 0.3 % of the solution's size. (With a limit of half the size, a
    training step in `benchmarks/neural_ode.py` took 101 ms on an H200 and 2.6 iterations; with coarse guesses it takes
    63 ms and one.) Otherwise `predictor` makes the guess, as it does for steps that the first attempt on a window leaves
    unsolved. A window that fails stores infinities. A trajectory carries no derivative: the solution depends on it only
    within the root finder's tolerance.

    **Arguments:**

    - `predictor`: makes the guess if there is no trajectory or it is not good.
    - `num_windows`: the number of windows, from the first of a solve on, whose trajectory is kept. The windows of every
        solve must lie in the same places to gain anything.

    **Cost:** one evaluation of all steps, in parallel. Memory `num_windows N D`, which Diffrax's loop carries. In a batch,
    `predictor` is evaluated for all members if one of them needs it, and for none if none does.

    **Raises:** `TypeError` if `predictor` is not a predictor or is a `WarmStart`; `TypeError` or `ValueError` if
    `num_windows` is not a positive integer. A solve raises `ValueError` if the base solver has a state of its own.
    """

    predictor: AbstractPredictor = CoarsePredictor()
    num_windows: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        if not isinstance(self.predictor, AbstractPredictor) or isinstance(self.predictor, WarmStart):
            raise TypeError(
                f"`WarmStart(predictor={self.predictor!r})`: expected a predictor that needs no trajectory, for example "
                "`CoarsePredictor()`."
            )
        check_integer("WarmStart", "num_windows", self.num_windows, "the number of windows whose trajectory is kept")

    @property
    def stored_windows(self):
        return self.num_windows

    def prepare(self, window):
        ts, predictor = self.predictor.prepare(window)
        return ts, WarmStart(predictor, self.num_windows)

    def predict(self, window, recurrence, start_level):
        return self.predictor.predict(window, recurrence, start_level)

    def guess(self, window, trajectory):
        guess = WindowGuess(self.predictor, window)
        return guess if trajectory is None else _WarmGuess(guess, trajectory)


class _WarmGuess(eqx.Module):
    """The trajectory of the previous solve where it is good, else the guess of `inner`."""

    inner: WindowGuess
    trajectory: Float[Array, " N D"]

    def __call__(self, segment, start, count, start_level):
        size = segment.length
        guess = self.trajectory[jnp.minimum(start + jnp.arange(size), self.inner.window.num_steps - 1)]
        _, score = assess(segment, guess)
        # Steps that the first attempt leaves unsolved were not solved from the trajectory.
        good = (jnp.asarray(start) == 0) & (score <= GOOD)
        warm = Prediction(guess, jnp.array(0), jnp.asarray(size), jnp.asarray(start_level))
        return evaluate_unless(good, warm, lambda: self.inner(segment, start, count, start_level))
