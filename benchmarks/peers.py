"""One trajectory with all outputs, parallel in time: this package beside others that do the same.

Van der Pol with `mu = 1`, T = 6.3, float64, from the own initial guess of each package. `ours` is `pdx.diffeqsolve`
by Tsit5 with `SaveAt(ts=...)` at every step, and nothing else said; `ours_end` the same with the end state only. `parode` is
https://github.com/casiacob/parallel-ode (RK4 on all steps, to a defect of 1e-12), `deer` `deer.solve_ivp` of
https://github.com/machine-discovery/deer at the same times. Each call starts from another initial state. Errors are the
largest ones of all outputs, against Dopri8 at a tolerance of 1e-13. Needs a GPU, and both repositories on the path.
"""

from collections.abc import Iterator

import diffrax as dfx
import jax
import jax.numpy as jnp

import parallel_diffrax as pdx

from . import harness


T1 = 6.3


def field(y):
    return jnp.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])


TERM = dfx.ODETerm(lambda t, y, args: field(y))


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    for num_steps in (256,) if quick else (8192, 65536):
        yield row(num_steps)


def row(num_steps: int) -> dict:
    # Imported on demand: somebody else's packages, for this comparison only.
    import deer  # pyright: ignore[reportMissingImports]
    from parode.explicit_parallel import explicit_par_integrate  # pyright: ignore[reportMissingImports]

    ts, step = jnp.linspace(0.0, T1, num_steps + 1), T1 / num_steps
    starts = [jnp.array([2.0, 0.0]) * (1 + 1e-3 * k) for k in range(4)]
    ones, inputs = jnp.ones((num_steps, 2)), jnp.zeros((num_steps + 1, 1))

    def ours(saveat):
        def solve(y0):
            sol = pdx.diffeqsolve(TERM, dfx.Tsit5(), 0.0, T1, step, y0, saveat=saveat, max_steps=num_steps)
            return sol.ys

        return solve

    fns = {
        "ours": ours(dfx.SaveAt(ts=ts)),
        "ours_end": ours(dfx.SaveAt(t1=True)),
        "parode": lambda y0: explicit_par_integrate(field, y0, ones, step, tol=1e-12, method="rk4")[0],
        "deer": lambda y0: deer.solve_ivp(lambda y, x, p: field(y), y0, inputs, (), ts).value,
    }
    exact = jax.jit(
        lambda y0: dfx.diffeqsolve(
            TERM, dfx.Dopri8(), 0.0, T1, None, y0, saveat=dfx.SaveAt(ts=ts),
            stepsize_controller=dfx.PIDController(rtol=1e-13, atol=1e-13),
        ).ys
    )  # fmt: skip
    found: dict = {"N": num_steps}
    want = exact(starts[0])
    for name, fn in fns.items():
        program = harness.build(fn, starts[0])
        y, times = harness.clock(program.call, starts, 41)
        found |= {f"{name}_ms": times["median_ms"], f"{name}_compile_s": program.compile_s}
        found[f"{name}_error"] = float(jnp.max(jnp.abs(y - want[-len(y) :])))
    return found | {"over_fastest": min(found["parode_ms"], found["deer_ms"]) / found["ours_ms"]}
