"""Random keys that are unsafe in parallel."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree


# `jax.vmap` of a draw from these generators gives other numbers than draws one by one.
_UNSAFE = ("rbg", "unsafe_rbg")
# The length of their keys as plain arrays.
_KEY_LENGTH = 4


def check_random_keys(terms: PyTree, args: PyTree):
    """Refuses keys of generators whose numbers depend on how many are drawn at once: steps in parallel would follow another
    Brownian path than steps in sequence.

    **Raises:** `ValueError` for such a key in `terms` or `args`.
    """
    for leaf in jtu.tree_leaves((terms, args)):
        if isinstance(leaf, jax.Array) and _generator(leaf) in _UNSAFE:
            raise ValueError(
                f"`diffeqsolve(..., solver=ParallelSolver(...))`: got a random key of the generator {_generator(leaf)!r}. "
                "All steps are made at once under `jax.vmap`, where this generator gives other numbers than step by step, "
                'so the path would differ. Use `jax.random.key(seed, impl="threefry2x32")`.'
            )


def _generator(leaf: jax.Array) -> str | None:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(leaf))
    if leaf.dtype == jnp.uint32 and leaf.shape[-1:] == (_KEY_LENGTH,):
        # A key in the old format does not name its generator, so it is taken to be the default one.
        return str(jax.config.jax_default_prng_impl)  # pyright: ignore
    return None
