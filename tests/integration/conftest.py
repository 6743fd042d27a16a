"""Other people's programs rely on JAX's implicit promotion of ranks and dtypes, which the other tests forbid."""

import jax


jax.config.update("jax_numpy_rank_promotion", "allow")
jax.config.update("jax_numpy_dtype_promotion", "standard")
