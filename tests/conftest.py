"""Every test runs in float64 unless it asks for less.

Nearly all of the suite's time is spent compiling small programs, so XLA is asked to optimise them less. To test the
programs that users run, optimised, at twice the time: `XLA_FLAGS= make test`.
"""

import os


os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax


jax.config.update("jax_enable_x64", True)
