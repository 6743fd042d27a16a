"""Random keys that are not safe to use in parallel."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree


# Of these generators, `jax.vmap` of a draw gives other numbers than draws one by one.
_UNSAFE = ("rbg", "unsafe_rbg")
# The length of their keys, as far as these are plain arrays.
_WORDS = 4


def check_random_keys(terms: PyTree, args: PyTree):
    """Refuses the keys of generators whose numbers depend on how many are drawn at once: steps made together would follow
    another Brownian path than steps made one after the other.

    **Raises:** `ValueError`.
    """
    for leaf in jtu.tree_leaves((terms, args)):
        if isinstance(leaf, jax.Array) and _generator(leaf) in _UNSAFE:
            raise ValueError(
                f"`diffeqsolve(..., solver=ParallelSolver(...))` with a random key of the generator {_generator(leaf)!r}: "
                "under `jax.vmap`, with which all steps are made at once, it gives other numbers than step by step, so "
                'that the path would not be the same. Use `jax.random.key(seed, impl="threefry2x32")`.'
            )


def _generator(leaf: jax.Array) -> str | None:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(leaf))
    if leaf.dtype == jnp.uint32 and leaf.shape[-1:] == (_WORDS,):
        # A key of the older kind: of the default generator, since nothing says otherwise.
        return str(jax.config.jax_default_prng_impl)  # pyright: ignore
    return None
