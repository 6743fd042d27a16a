"""Every test runs in float64 unless it asks for less, under JAX's strict settings: no implicit promotion of ranks or dtypes.
It is compiled as fast as XLA does without making wrong code.

The suite's time is mostly compilation. LLVM without the passes that only make programs faster, and HLO without two passes
over loops that cost more than they save here, compile in less than half of the time. (Processor time with jaxlib 0.10.2, one
window of Kepler's problem, a gradient by the default adjoint and one through a path with noise: 85 s without, 31 s with.
With jaxlib 0.12.0, a gradient by the default adjoint: 12 s without, 6 s with.)

The flags change rounding. `make test-all` also runs the suite without them, as users compile
(`PARALLEL_DIFFRAX_TEST_FLAGS=off`).

XLA's lowest level of optimisation, `--xla_backend_optimization_level=0`, is not used: with jaxlib 0.10.2 and 0.11.2 it
makes wrong code on the CPU (the gradient of a plain sequential Diffrax solve is off by 1e-3).
"""

import gc
import os

import jaxlib.version


FLAGS = [
    "--xla_backend_optimization_level=1",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_disable_hlo_passes=while-loop-invariant-code-motion,simplify-while-loops",
    # One module for LLVM: splitting it costs more than a second processor gains, since there is a worker on each.
    "--xla_cpu_parallel_codegen_split_count=1",
    # LLVM vectorises, inlines and unrolls nothing, and skips passes of the code generator that only make code faster.
    "--xla_backend_extra_options="
    "-force-vector-width=1,-force-vector-interleave=1,-inline-threshold=0,-unroll-threshold=0,"
    "-enable-misched=false,-disable-machine-licm,-disable-machine-cse,-disable-cgp,-disable-lsr,"
    "-disable-block-placement,-disable-branch-fold,-disable-tail-duplicate,-disable-early-taildup",
]
# XLA ends the process at a flag that it does not know, and only jaxlib 0.10 knows its earlier code generator.
if jaxlib.version.__version_info__[:2] == (0, 10):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
# XLA reads the flags when the first program is compiled.
if os.environ.get("PARALLEL_DIFFRAX_TEST_FLAGS") != "off":
    os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import jax  # noqa: E402


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# The garbage collector skips what is imported, and runs less often while programs are traced.
gc.freeze()
gc.set_threshold(50_000, 20, 20)
