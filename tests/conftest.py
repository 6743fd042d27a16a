"""Every test runs in float64 unless it asks for less.

XLA's own switch for compiling faster, `--xla_backend_optimization_level=0`, is not used though the suite's time is mostly
compilation: with jaxlib 0.10.2 and 0.11.2 it makes wrong code on the CPU (the gradient of a plain sequential Diffrax solve
is off by 1e-3).
"""

import jax


jax.config.update("jax_enable_x64", True)
