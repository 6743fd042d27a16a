"""The trajectory of the solve before."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._recurrence import Prediction
from ..._scan import check_integer
from .._window import Window
from ._base import AbstractPredictor, evaluate_unless, WindowGuess
from ._coarse import assess, CoarsePredictor, GOOD


class WarmStart(AbstractPredictor):
    """Begins with the trajectory of an earlier solve, which Diffrax hands on as `solver_state`: what makes a training loop
    converge in one or two iterations, mostly with no step made in sequence.

    ```python
    solver = pdx.ParallelSolver(diffrax.Tsit5(), num_steps=4096, predictor=pdx.WarmStart())
    state = solver.init(term, t0, t1, y0, args)  # nothing is known: made here, so that every solve has one
    for _ in range(100):
        sol = diffrax.diffeqsolve(
            term, solver, t0, t1, dt0, y0, args, saveat=diffrax.SaveAt(ts=ts, solver_state=True), solver_state=state
        )
        state = sol.solver_state
        ...
    ```

    The guess is for problems that change little from solve to solve: the same times and number of steps, nearly the same
    parameters and initial state. In a minibatch every member needs its own: `state = jax.vmap(lambda y0: solver.init(term,
    t0, t1, y0, args))(y0s)`, of which `jax.tree.map(lambda x: x[members], state)` goes into the solve.

    It can do no harm: it is used only if nothing in it is NaN and it is as good a guess as a coarse one must be, that is, if
    the defects that it leaves in the new equations add up to less than 0.3 % of the solution's size. (With half of the
    size as the limit, a step of the training in `benchmarks/neural_ode.py` took 101 ms on an H200, 2.6 iterations, where
    coarse guesses take one and 63 ms.) Otherwise, and for whatever the first attempt on a window leaves unsolved, the
    guess is that of `predictor`. A window that fails leaves NaN.

    **Arguments:**

    - `predictor`: makes the guess where there is no trajectory or it is of no use.
    - `num_windows`: of how many windows, the first ones of a solve, the trajectory is kept. Windows must be laid in the same
        places in every solve to gain anything.

    A trajectory carries no derivative, nor does the solution depend on it beyond the root finder's tolerance.

    Cost: one evaluation of all steps, in parallel. Memory `num_windows N D`, which Diffrax's loop carries. In a batch,
    `predictor` is evaluated for all members if one of them needs it, and for none if none does.
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
    def memory(self):
        return self.num_windows

    def prepare(self, window):
        fractions, predictor = self.predictor.prepare(window)
        return fractions, WarmStart(predictor, self.num_windows)

    def predict(self, window, recurrence, start_level):
        return self.predictor.predict(window, recurrence, start_level)

    def guess(self, window, remembered):
        if remembered is None:
            return WindowGuess(self.predictor, window)
        return _WarmGuess(WindowGuess(self.predictor, window), remembered)


class _WarmGuess(eqx.Module):
    """The trajectory of the solve before, where it is of use; else what `inner` guesses."""

    inner: WindowGuess
    trajectory: Float[Array, " N D"]

    @property
    def window(self) -> Window:
        """The window."""
        return self.inner.window

    def __call__(self, segment, start, count, start_level):
        size = segment.length
        guess = self.trajectory[jnp.minimum(start + jnp.arange(size), self.window.num_steps - 1)]
        _, score = assess(segment, guess)
        # What the first attempt leaves, the trajectory did not solve.
        near = (jnp.asarray(start) == 0) & (score <= GOOD)
        warm = Prediction(guess, jnp.array(0), jnp.asarray(size), jnp.asarray(start_level))

        return evaluate_unless(near, warm, lambda: self.inner(segment, start, count, start_level))
