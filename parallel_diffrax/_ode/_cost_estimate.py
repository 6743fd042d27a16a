"""What a solve would cost on a GPU, before it is made."""

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._recurrence import AbstractPolicy, CostEstimate, operations_in_kernel, Sequential
from .._scan import check_integer
from ._predictor import ConstantPredictor
from ._solver import ParallelSolver
from ._window import time_dtype


def estimate_cost(
    terms: PyTree[dfx.AbstractTerm],
    solver: dfx.AbstractSolver,
    t0: Float[ArrayLike, ""],
    t1: Float[ArrayLike, ""],
    y0: PyTree[Array],
    args: PyTree = None,
    *,
    num_steps: int,
    batch_size: int = 1,
) -> CostEstimate:
    """Estimates what `num_steps` steps cost on a GPU: in sequence, in parallel, and by Diffrax.

    Use it on any machine, also without a GPU, to see whether solving in parallel may pay and what `CostPolicy` chooses. It
    is an estimate by the size of the problem alone. It does not know whether Newton's method converges: a solve with
    `policy=AdaptivePolicy()` tells, also on a CPU (`statistics(sol)`: `iterations`, `sequential_steps`). Times on your own
    device only a clock can tell.

    On a CPU, `CostPolicy` makes steps sequentially, and under an adaptive step-size controller it does so on every device.

    ```python
    print(pdx.diagnostics.estimate_cost(term, diffrax.Tsit5(), 0.0, 400.0, y0, args, num_steps=16384))
    ```

    **Arguments:**

    - `terms`, `solver`, `t0`, `t1`, `y0`, `args`: as in `diffrax.diffeqsolve`. A `ParallelSolver` stands for its base
        solver.
    - `num_steps`: `N`, the number of steps: `(t1 - t0) / dt0`, or what an adaptive solve took
        (`sol.stats["num_accepted_steps"]`).
    - `batch_size`: the number of members of a batch, over all nested `jax.vmap`.

    **Returns:** a `CostEstimate`, in seconds and bytes.

    **Cost:** a solve of one step is traced. Nothing is compiled or run.

    **Raises:** `TypeError` or `ValueError` if `num_steps` or `batch_size` is not a positive integer, and what
    `diffrax.diffeqsolve` raises for this solver and these terms.
    """
    check_integer("estimate_cost", "num_steps", num_steps, "the number of steps")
    check_integer("estimate_cost", "batch_size", batch_size, "the number of members of the batch")
    # A solver that wraps another one claims to be an instance of it.
    wrapped = isinstance(solver, ParallelSolver) and issubclass(type(solver), ParallelSolver)
    base = solver.solver if wrapped else solver  # pyright: ignore[reportAttributeAccessIssue]
    dtype = time_dtype(t0, t1)
    begin, end = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
    one_step = dfx.StepTo(jnp.stack([begin, end]))
    found = _Found()
    counting = ParallelSolver(base, 1, predictor=ConstantPredictor(), policy=_Counting(found))
    # Diffrax itself brings the terms, times and states into the form in which steps are made.
    solve = lambda: dfx.diffeqsolve(terms, counting, begin, end, None, y0, args, stepsize_controller=one_step)
    eqx.filter_eval_shape(solve)
    return CostEstimate.of(num_steps, found.size, batch_size, found.operations, found.itemsize)


class _Found:
    """What was found while a step was traced."""

    operations: float | None = None
    size = itemsize = 0


class _Counting(AbstractPolicy):
    """Counts the operations of a step."""

    found: _Found = eqx.field(static=True)

    def solve(self, driver):
        recurrence, found = driver.recurrence, self.found
        found.operations = operations_in_kernel(recurrence.step, recurrence.init, recurrence.first_input)
        found.size, found.itemsize = recurrence.init.size, recurrence.init.dtype.itemsize
        return Sequential("off").solve(driver)
