"""An unbiased estimate of the Jacobian's diagonal: quasi-Newton at a fixed number of products."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, UInt32

from ..._scan import check_integer, DiagonalTransitions, preceded_by
from ._base import AbstractJacobian, linearised


class Hutchinson(AbstractJacobian):
    """The diagonal of every step's Jacobian by Hutchinson's estimator: the mean over probes of `v * (A[i] v)`, with signs
    `v` drawn independently for every step.

    Unbiased, with a variance of the sum of squares of the off-diagonal entries of each row over the number of probes; exact
    for a diagonal Jacobian with one probe. The same probes serve every iteration, so that the iteration is a fixed one and
    converges.

    **Arguments:**

    - `num_probes`: the number of probes, at least 1.
    - `key`: a `jax.random.key`, from which they are drawn.

    Cost of an iteration: `num_probes` Jacobian-vector products of a step, one after the other, and `D` multiplications a
    step for the scan; memory a few `N D`.

    ??? cite "References"

        Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines", 1990.

        Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", 2007.
    """

    num_probes: int = eqx.field(static=True)
    key: PRNGKeyArray | UInt32[Array, "2"]

    def __check_init__(self):
        check_integer("Hutchinson", "num_probes", self.num_probes, "the number of probes")

    def linearise(self, residual, y):
        r, product, aux = linearised(residual, y)

        def add(k, total):
            probe = jax.random.rademacher(jax.random.fold_in(self.key, k), y.shape, y.dtype)
            # The product at step `i` is `A[i]` times the probe of the step before.
            return total + preceded_by(probe[0], probe) * product(probe)

        total = jax.lax.fori_loop(0, self.num_probes, add, jnp.zeros_like(y))
        return r, DiagonalTransitions(total / self.num_probes), aux
