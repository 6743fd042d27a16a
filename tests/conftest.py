"""Every test runs in float64 unless it asks for less, and is compiled by XLA's earlier code generator for the CPU.

The suite's time is mostly compilation. That generator emits the same programs at the same level of optimisation in 55 to
75 % of the time (jaxlib 0.10.2: steps of seven of Diffrax's solvers, 17 s instead of 32 s). `XLA_FLAGS= make test` uses the
present one.

XLA's own switch for compiling faster, `--xla_backend_optimization_level=0`, is not used: with jaxlib 0.10.2 and 0.11.2 it
makes wrong code on the CPU (the gradient of a plain sequential Diffrax solve is off by 1e-3).
"""

import gc
import os

import jaxlib.version


# XLA ends the process at a flag that it does not know, and jaxlib 0.11.2 no longer knows this one. It reads the flags when
# the first program is compiled.
if jaxlib.version.__version_info__[:2] == (0, 10):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax


jax.config.update("jax_enable_x64", True)
# What is imported stays: the collector need not look at it again and again while programs are traced.
gc.freeze()
