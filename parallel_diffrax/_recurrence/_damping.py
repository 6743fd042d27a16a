"""How strongly `ELK` damps its steps, and how that changes from iteration to iteration."""

import abc
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class AbstractDamping(eqx.Module):
    """A rule for the damping `l` of `(L^T L + l) d = L^T r`, from a number that it remembers. `adapts` tells whether it
    rises after a step that was rejected: otherwise only a step that is not finite is."""

    adapts: ClassVar[bool]

    @abc.abstractmethod
    def start(self, dtype) -> Float[Array, ""]:
        """The number at the beginning."""

    @abc.abstractmethod
    def damping(self, number: Float[Array, ""], relative_merit: Float[Array, ""]) -> Float[Array, ""]:
        """The damping `l` of an iteration.

        **Arguments:** the number; `|r|^2 / (|y|^2 + |y + r|^2)`, how far the iterate is from a solution.
        """

    @abc.abstractmethod
    def next(self, number: Float[Array, ""], trust: Float[Array, ""], accepted: Bool[Array, ""]) -> Float[Array, ""]:
        """The number after an iteration.

        **Arguments:** the number; how well the linearisation foretold the residual, 1 at best; whether the step was taken.
        """


def _check_positive(name, field, value, or_zero=False):
    # Written so that NaN fails.
    if isinstance(value, (int, float)) and not (value >= 0 if or_zero else value > 0):
        raise ValueError(
            f"`{name}({field}={value!r})`: expected a {'number of at least 0' if or_zero else 'positive number'}."
        )


class FixedDamping(AbstractDamping):
    """The same damping in every iteration. What suits depends on the problem and its length, and convergence is linear, at
    best by a factor `l` an iteration: `AdaptiveDamping` needs no such choice.

    **Arguments:**

    - `value`: `l`, at least 0; with 0, the steps are Newton's.
    """

    value: float | Float[Array, ""]
    adapts: ClassVar[bool] = False

    def __check_init__(self):
        _check_positive("FixedDamping", "value", self.value, or_zero=True)

    def start(self, dtype):
        return jnp.asarray(self.value, dtype)

    def damping(self, number, relative_merit):
        del relative_merit
        return number

    def next(self, number, trust, accepted):
        del trust, accepted
        return number


class AdaptiveDamping(AbstractDamping):
    """Damping in proportion to the squared residual: `l = m |r|^2 / (|y|^2 + |F(y)|^2)`, so that an amplification of
    residuals beyond the size of the states is suppressed, whatever the problem and its length; and so that damping vanishes
    with the residual, which keeps convergence quadratic. The factor `m` doubles after a step whose outcome the linearisation
    did not foretell (trust below `low`), is divided by two after one that it foretold well (above `high`), and is multiplied
    by ten after a step that was rejected.

    **Arguments:**

    - `initial`: the first `m`.
    - `low`, `high`: the bounds of the trust between which `m` stays.

    The defaults were chosen on ten recurrences, among them van der Pol, FitzHugh-Nagumo, Lotka-Volterra, Lorenz, gated
    networks and Langevin chains from constant guesses: the number of iterations is flat around them.

    ??? cite "References"

        Fan and Yuan, "On the quadratic convergence of the Levenberg-Marquardt method without nonsingularity assumption",
        Computing 74 (2005): the proportion to the squared residual.

        Nocedal and Wright, "Numerical Optimization", chapter 10: the adaptation.
    """

    initial: float | Float[Array, ""] = 0.1
    low: float = 0.0
    high: float = 0.9
    adapts: ClassVar[bool] = True

    def __check_init__(self):
        _check_positive("AdaptiveDamping", "initial", self.initial)
        if not self.low < self.high:
            raise ValueError(f"`AdaptiveDamping(low={self.low!r}, high={self.high!r})`: `low` must be below `high`.")

    def start(self, dtype):
        return jnp.asarray(self.initial, dtype)

    def damping(self, number, relative_merit):
        return number * relative_merit

    def next(self, number, trust, accepted):
        factor = jnp.where(trust < self.low, 2, jnp.where(trust > self.high, 0.5, 1))
        factor = jnp.where(accepted, factor, 10)
        return jnp.clip(number * factor, 1e-12, 1e12).astype(number.dtype)
