"""Every test runs in float64 unless it asks for less, and is compiled as fast as jaxlib 0.10 does without making wrong code.

The suite's time is mostly compilation. XLA's earlier code generator for the CPU, LLVM without what only makes programs
faster, and HLO without two passes over loops that cost more than they save here, compile in less than half of the time
(jaxlib 0.10.2, one window of Kepler's problem, a gradient by the default adjoint and one through a path with noise: 85 s of
processor time with that generator alone, 31 s with all of it). `XLA_FLAGS= make test` compiles as users do.

XLA's lowest level of optimisation, `--xla_backend_optimization_level=0`, is not used: with jaxlib 0.10.2 and 0.11.2 it
makes wrong code on the CPU (the gradient of a plain sequential Diffrax solve is off by 1e-3).
"""

import gc
import os

import jaxlib.version


# XLA ends the process at a flag that it does not know, and jaxlib 0.11.2 no longer knows the first one. It reads the flags
# when the first program is compiled.
if jaxlib.version.__version_info__[:2] == (0, 10):
    flags = (
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_backend_optimization_level=1",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_disable_hlo_passes=while-loop-invariant-code-motion,simplify-while-loops",
        # One module for LLVM: to split it costs more than a second processor gains, since there is a worker on each.
        "--xla_cpu_parallel_codegen_split_count=1",
        # Of LLVM: nothing vectorised, inlined or unrolled, and no pass of the code generator that only makes code faster.
        "--xla_backend_extra_options="
        "-force-vector-width=1,-force-vector-interleave=1,-inline-threshold=0,-unroll-threshold=0,"
        "-enable-misched=false,-disable-machine-licm,-disable-machine-cse,-disable-cgp,-disable-lsr,"
        "-disable-block-placement,-disable-branch-fold,-disable-tail-duplicate,-disable-early-taildup",
    )
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))

import jax


jax.config.update("jax_enable_x64", True)
# What is imported stays: the collector need not look at it again and again while programs are traced, nor so often at what
# tracing makes.
gc.freeze()
gc.set_threshold(50_000, 20, 20)
