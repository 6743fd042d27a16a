"""`statistics(sol)` returns what a solve or a batch of solves did, and refuses other solutions with a reason."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel_diffrax as pdx

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, parallel_solver


PARALLEL = parallel_solver(dfx.Bosh3(), 32)


def solve(y0, solver=PARALLEL, step=1.0, **saved):
    return dfx.diffeqsolve(DRIVEN, solver, 0.0, 2.0, step, y0, DRIVEN_ARGS, saveat=dfx.SaveAt(t1=True, **saved))


@pytest.mark.full
def test_a_solve_and_a_batch_of_solves_have_the_same_statistics():
    alone = pdx.statistics(solve(DRIVEN_Y0, solver_state=True))
    assert (int(alone.windows), int(alone.parallel_steps + alone.sequential_steps)) == (2, 64)
    assert float(alone.duration) == 2.0
    batch = jax.vmap(lambda y0: solve(y0, solver_state=True))(jnp.stack([DRIVEN_Y0, -DRIVEN_Y0]))
    together = pdx.statistics(batch)
    assert together.windows.shape == together.lyapunov.shape == (2,)
    assert int(together.iterations[0]) == int(alone.iterations)
    np.testing.assert_allclose(together.lyapunov[0], alone.lyapunov, rtol=1e-10)
    # A pytree of counts only, which prints as a table.
    assert all(np.ndim(leaf) == 0 for leaf in jax.tree.leaves(alone))
    assert "parallel_steps: " in str(alone) and "lyapunov: " in str(alone)


def test_other_solutions_are_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"Pass `SaveAt\(..., solver_state=True\)`"):
        pdx.statistics(solve(DRIVEN_Y0))
    with pytest.raises(TypeError, match=r"got the solver state `tuple` of another solver"):
        pdx.statistics(solve(DRIVEN_Y0, dfx.Bosh3(), solver_state=True))
