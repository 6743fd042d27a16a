"""Robertson's reaction, the classical stiff problem: its three rate constants, fitted to concentrations over seven decades.

The rates differ by nine orders of magnitude, and the middle substance never exceeds four parts in a hundred thousand. An
implicit method under a PIDController makes steps from 1e-5 to 1e4 seconds. The samples are simulated, with 2 % noise. The
fit is Levenberg-Marquardt (Optimistix), on the logarithms of the constants, with derivatives in forward mode.

Prints the fit, and how long a solve and its Jacobian take beside plain Diffrax, with only the import changed. Draws samples
and fit, and the lengths of the steps.

    python examples/robertson.py [picture.png]
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx
from timing import Case, picture, report

import parallel_diffrax as pdx


jax.config.update("jax_enable_x64", True)

T = 1e5
TS = jnp.logspace(-2, 5, 36)
TRUE = jnp.array([0.04, 3e7, 1e4])
NAMES = ("A -> B", "2 B -> B + C", "B + C -> A + C")
Y0 = jnp.array([1.0, 0.0, 0.0])


def field(t, y, rates):
    a, b, c = y
    first, second, third = rates[0] * a, rates[1] * b**2, rates[2] * b * c
    return jnp.stack([third - first, first - second - third, second])


def concentrations(
    diffeqsolve, adjoint: dfx.AbstractAdjoint = dfx.RecursiveCheckpointAdjoint(), saveat=dfx.SaveAt(ts=TS)
):
    """A function from the rate constants to the solution."""
    controller = dfx.PIDController(rtol=1e-6, atol=1e-10)

    def solve(rates):
        return diffeqsolve(
            dfx.ODETerm(field), dfx.Kvaerno5(), 0.0, T, 1e-5, Y0, rates, saveat=saveat, stepsize_controller=controller,
            adjoint=adjoint, max_steps=2048,
        )  # fmt: skip

    return solve


def logarithms(diffeqsolve, adjoint=dfx.ForwardMode()):
    """The logarithms of the concentrations at `TS`, from those of the rate constants."""
    solve = concentrations(diffeqsolve, adjoint)
    return lambda logs: jnp.log(solve(jnp.exp(logs)).ys)


EXACT = jax.jit(logarithms(pdx.diffeqsolve))(jnp.log(TRUE))
MEASURED = EXACT + 0.02 * np.random.default_rng(0).normal(size=EXACT.shape)
START = jnp.log(TRUE * jnp.array([3.0, 0.2, 4.0]))
CASES = {
    "solve": Case(lambda diffeqsolve: lambda rates: concentrations(diffeqsolve)(rates).ys, (TRUE,)),
    "Jacobian": Case(lambda diffeqsolve: jax.jacfwd(logarithms(diffeqsolve)), (START,), 1e-6),
}


def fit():
    """The fitted logarithms, and the number of steps of the optimiser."""
    residual = logarithms(pdx.diffeqsolve)
    solver = optx.LevenbergMarquardt(rtol=1e-6, atol=1e-6)
    sol = optx.least_squares(lambda logs, _: residual(logs) - MEASURED, solver, START, options={"jac": "fwd"})
    return sol.value, int(sol.stats["num_steps"])


def draw(path, fitted):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    dense = dfx.SaveAt(t1=True, dense=True)
    sol = jax.jit(concentrations(pdx.diffeqsolve, saveat=dense))(jnp.exp(fitted))
    ts = jnp.logspace(-3, 5, 400)
    ys, start = jax.vmap(sol.evaluate)(ts), jax.jit(concentrations(pdx.diffeqsolve))(jnp.exp(START)).ys
    for k, (name, scale) in enumerate((("A", 1.0), ("10 000 B", 1e4), ("C", 1.0))):
        left.semilogx(ts, scale * ys[:, k], color=f"C{k}", lw=1.2, label=name)
        left.semilogx(TS, scale * jnp.exp(MEASURED[:, k]), "o", color=f"C{k}", ms=3)
        left.semilogx(TS, scale * start[:, k], ":", color=f"C{k}", lw=1)
    left.set(xlabel="seconds", ylabel="concentration", title="samples, fit, and start (dotted)")
    left.legend()
    ends = np.asarray(sol.interpolation.ts)[: int(sol.interpolation.ts_size)]
    right.loglog(ends[1:], np.diff(ends), ".-", ms=3, lw=0.8)
    right.set(xlabel="seconds", ylabel="length of a step", title=f"{len(ends) - 1} steps of Kvaerno5")
    figure.savefig(path, dpi=110)


def main(path):
    print(f"On this {jax.default_backend().upper()}, Kvaerno5 with a PIDController at 1e-6:")
    report(CASES)
    fitted, steps = fit()
    print(f"Levenberg-Marquardt: {steps} steps")
    for name, start, found, true in zip(NAMES, jnp.exp(START), jnp.exp(fitted), TRUE):
        print(f"  {name}: {start:.3g} at first, {found:.4g} fitted, {true:.4g} true")
    draw(path, fitted)


if __name__ == "__main__":
    main(picture(__file__))
