"""The compiled program of a solve has few kernels, each of which costs a GPU its launch whatever the number of steps, and
needs the memory that the documentation says."""

import re

import diffrax as dfx
import jax
import jax.numpy as jnp

import parallel_diffrax as pdx
from parallel_diffrax._scan import DenseTransitions

from .problems import parallel_solver


def oscillator(t, y, args):
    return jnp.stack([y[1], -jnp.sin(y[0]) - 0.1 * y[1]])


def kernels(text: str) -> int:
    """What is launched: operations that move or compute anything, outside of fusions."""
    count, inside = 0, False
    for line in text.splitlines():
        if re.match(r"^(ENTRY )?%?[\w.\-]+ \(.*\{$", line):
            inside = "fused" not in line and "region_reduce" not in line
        elif inside and re.search(
            r" (fusion|copy|custom-call|dot|reduce|concatenate|dynamic-update-slice|pad)\(", line
        ):
            count += 1
    return count


# With the passes that other tests do without (`conftest.py`), as users compile.
ALL_PASSES = {"xla_disable_hlo_passes": ""}


def compiled(scan, num_steps=256, **options):
    solver = parallel_solver(dfx.Heun(), num_steps, root_finder=pdx.ParallelNewton(scan=scan), **options)

    def solve(y0):
        sol = dfx.diffeqsolve(dfx.ODETerm(oscillator), solver, 0.0, 10.0, 10.0, y0, max_steps=1, throw=False)
        return sol.ys

    return jax.jit(solve).lower(jnp.array([1.0, 0.0])).compile(ALL_PASSES).as_text()


def test_a_scan_has_so_many_kernels_a_level():
    def count(num_steps):
        A, r = jnp.ones((num_steps, 2, 2)), jnp.ones((num_steps, 2))
        solve = jax.jit(lambda A, r: pdx.scans.KoggeStoneScan().solve(DenseTransitions(A), r))
        return kernels(solve.lower(A, r).compile(ALL_PASSES).as_text())

    # Two a level on a CPU, for matrices and vectors, and what makes the masks.
    short, long = count(256), count(4096)
    assert 4 <= long - short <= 3 * 4 and short <= 3 * 8


def test_a_solve_has_few_kernels_whatever_the_number_of_steps():
    cheap = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}
    scan = pdx.scans.SequentialScan()
    bare, longer = (kernels(compiled(scan, num_steps, **cheap)) for num_steps in (256, 4096))
    assert longer <= 1.1 * bare
    # (115 and 234 kernels under Kogge-Stone's scan with jaxlib 0.10.2.)
    assert bare < kernels(compiled(scan)) <= 3 * bare


def test_the_stages_of_a_step_are_compiled_apart():
    """Together, in one loop over the members of a batch, XLA may never end with many dependent selections (JAX
    0.11 and 0.12)."""

    def field(t, y, on):
        for _ in range(4):
            y = jnp.where(on, 0.5 * y, y)
        return -y

    def end(y0, on):
        return pdx.diffeqsolve(dfx.ODETerm(field), dfx.Dopri8(), 0.0, 1.0, 0.1, y0, on).ys[0]

    y0, on = jnp.linspace(1.0, 2.0, 4), jnp.array([True, False, True, False])
    lowered = jax.jit(jax.vmap(end)).lower(y0, on)
    assert lowered.as_text().count("optimization_barrier") >= 12
    exact = y0 * jnp.exp(-jnp.where(on, 0.5**4, 1.0))
    assert jnp.allclose(lowered.compile(ALL_PASSES)(y0, on), exact, rtol=1e-9)


def test_memory_is_so_many_jacobians_a_step():
    def coupled(t, y, args):
        return args * (jnp.roll(y, 1) - y**3)

    def loss(args, num_steps):
        root_finder = pdx.ParallelNewton(scan=pdx.scans.BlockedScan(radix=4, num_carries=256))
        solver = parallel_solver(dfx.Heun(), num_steps, root_finder=root_finder, predictor=pdx.ConstantPredictor())
        sol = dfx.diffeqsolve(
            dfx.ODETerm(coupled), solver, 0.0, 1.0, 1.0, jnp.ones(4), args,
            max_steps=1, adjoint=dfx.DirectAdjoint(), throw=False,
        )  # fmt: skip
        return jnp.sum(sol.ys**2)

    def jacobians(num_steps):
        compiled = jax.jit(jax.grad(lambda args: loss(args, num_steps))).lower(1.0).compile(ALL_PASSES)
        return compiled.memory_analysis().temp_size_in_bytes / (8 * num_steps * 4**2)

    # On a GPU 9.7 to 10.5 with Tsit5, forwards 8.3 to 8.8 (`benchmarks/README.md`).
    assert 2 <= jacobians(2**14) <= 12
