"""What Diffrax and Equinox do not offer under a public name. No other file of this room except `_loop_state.py` uses such
names.

Each name states why it is needed. If a release removes one, importing this file fails, or the tests of its users do.
"""

import diffrax as dfx
import equinox.internal as eqxi
import optimistix as optx


# `diffrax.with_stepsize_controller_tols(cls)()` marks a tolerance as "taken from the step-size controller" by an object that
# Diffrax does not export. Any such root finder holds it.
_UNSET = dfx.with_stepsize_controller_tols(optx.Chord)().rtol


def is_unset_tolerance(value) -> bool:
    """Whether a tolerance of a root finder is to be taken from the step-size controller."""
    return value is _UNSET


# Whether a condition holds for any member of a batch. Under `jax.vmap`, a branch is skipped only if its condition has no
# batch axis. JAX has no public way to remove the axis.
unvmap_any = eqxi.unvmap_any


def not_reversible(tree, message: str):
    """`tree`, with an error `message` if it is differentiated in reverse mode. JAX's own error names an internal loop."""
    return eqxi.nondifferentiable_backward(tree, msg=message, symbolic=True)
