"""The only place that touches what Diffrax, Equinox, Lineax and Optimistix do not offer under a public name."""

import diffrax as dfx
import equinox.internal as eqxi
import optimistix as optx


# `diffrax.with_stepsize_controller_tols(cls)()` marks tolerances as "to be taken from the step-size controller" by an
# object that Diffrax does not export. It can be had from any such root finder.
_UNSET = dfx.with_stepsize_controller_tols(optx.Chord)().rtol


def is_unset_tolerance(value) -> bool:
    """Whether this tolerance of a root finder waits for those of a step-size controller."""
    return value is _UNSET


# In a batch: whether a condition holds for any member. Only a condition without a batch dimension skips a branch.
unvmap_any = eqxi.unvmap_any


def not_reversible(tree, message: str):
    """`tree`, which raises `message` where it is differentiated in reverse mode; JAX would name an internal loop."""
    return eqxi.nondifferentiable_backward(tree, msg=message, symbolic=True)
