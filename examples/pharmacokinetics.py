"""A drug given by mouth every twelve hours: a population of patients, and their clearances fitted to blood samples.

A patient swallows a tablet, which reaches the blood through the gut; two compartments and saturable elimination. A tablet
dissolves at a constant rate for half an hour, so the vector field jumps when it is taken and when it is gone: the controller
must end steps there (`jump_ts`). Patients differ in body weight, clearance and dose. The samples are simulated, with 10 %
noise.

Prints the fit, and how long a solve and a gradient of all patients take beside plain Diffrax, with only the import changed.
Draws some patients.

    python examples/pharmacokinetics.py [picture.png]
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from timing import Case, descend, picture, report

import parallel_diffrax as pdx


jax.config.update("jax_enable_x64", True)

# Times in hours, volumes in litres, amounts in mg.
T, INTERVAL, DISSOLVES = 72.0, 12.0, 0.5
DOSES = jnp.arange(0.0, T, INTERVAL)
JUMPS = jnp.sort(jnp.concatenate([DOSES[1:], DOSES + DISSOLVES]))
CONTROLLER = dfx.ClipStepSizeController(dfx.PIDController(rtol=1e-6, atol=1e-6), jump_ts=JUMPS)
# Blood is taken often after the first and the last dose, and before each in between.
SAMPLES = jnp.array([0.5, 1, 2, 4, 8, 12, 24, 36, 48, 60.5, 61, 62, 64, 68, 72])
PATIENTS = 32


def field(t, y, patient):
    """Amounts in the gut, in the blood, and in the tissue."""
    gut, blood, tissue = y
    weight, clearance, dose = patient
    taken = (t >= DOSES) & (t < DOSES + DISSOLVES)
    absorbed = 1.2 * gut
    volume = 0.5 * weight
    concentration = blood / volume
    # Elimination saturates at 20 mg / l.
    eliminated = clearance * (weight / 70) ** 0.75 * concentration / (1 + concentration / 20)
    exchanged = 0.3 * blood - 0.15 * tissue
    return jnp.stack([dose / DISSOLVES * jnp.any(taken) - absorbed, absorbed - exchanged - eliminated, exchanged])


def concentrations(diffeqsolve, ts=SAMPLES):
    """The concentrations in the blood of one patient at `ts`."""

    def solve(patient):
        sol = diffeqsolve(
            dfx.ODETerm(field), dfx.Tsit5(), 0.0, T, None, jnp.zeros(3), patient, saveat=dfx.SaveAt(ts=ts),
            stepsize_controller=CONTROLLER, max_steps=1024,
        )  # fmt: skip
        return sol.ys[:, 1] / (0.5 * patient[0])

    return solve


def population() -> tuple[jax.Array, jax.Array]:
    """Weights, clearances and doses of the patients, and their samples."""
    rng = np.random.default_rng(0)
    weights = rng.normal(72, 12, PATIENTS)
    clearances = 5.0 * np.exp(0.3 * rng.normal(size=PATIENTS))
    doses = rng.choice([250.0, 500.0, 750.0], PATIENTS)
    patients = jnp.asarray(np.stack([weights, clearances, doses], axis=1))
    exact = jax.jit(jax.vmap(concentrations(pdx.diffeqsolve)))(patients)
    return patients, exact * np.exp(0.1 * rng.normal(size=exact.shape))


KNOWN, MEASURED = population()


def loss(diffeqsolve):
    """The misfit of all patients: the mean squared error of the logarithms of the concentrations."""

    def misfit(logs):
        patients = KNOWN.at[:, 1].set(jnp.exp(logs))
        found = jax.vmap(concentrations(diffeqsolve))(patients)
        return jnp.mean((jnp.log(found) - jnp.log(MEASURED)) ** 2)

    return misfit


START = jnp.full(PATIENTS, jnp.log(8.0))
CASES = {
    "solve of all patients": Case(lambda diffeqsolve: jax.vmap(concentrations(diffeqsolve)), (KNOWN,)),
    "loss and gradient": Case(lambda diffeqsolve: jax.value_and_grad(loss(diffeqsolve)), (START,)),
}


def fit(steps: int = 60):
    """The logarithms of the clearances, and the losses."""
    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, steps))
    return descend(loss(pdx.diffeqsolve), START, optimiser, steps)


def draw(path, clearances):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[2, 1], layout="constrained")
    ts = jnp.linspace(0.0, T, 721)
    curve = jax.jit(concentrations(pdx.diffeqsolve, ts))
    for k, patient in enumerate(KNOWN.at[:, 1].set(clearances)[:4]):
        left.plot(ts, curve(patient), color=f"C{k}", lw=1.2, label=f"{patient[0]:.0f} kg, {patient[2]:.0f} mg")
        left.plot(SAMPLES, MEASURED[k], "o", color=f"C{k}", ms=4)
    left.set(xlabel="hours", ylabel="concentration, mg / l", title="four patients: samples and fit")
    left.legend(fontsize=8)
    right.plot(KNOWN[:, 1], clearances, "o", ms=4)
    ends = [float(KNOWN[:, 1].min()), float(KNOWN[:, 1].max())]
    right.plot(ends, ends, color="black", lw=0.8)
    right.set(xlabel="true clearance, l / h", ylabel="fitted clearance", title="all patients")
    figure.savefig(path, dpi=110)


def main(path):
    print(f"On this {jax.default_backend().upper()}, {PATIENTS} patients, Tsit5 with a PIDController at 1e-6:")
    report(CASES)
    logs, losses = fit()
    error = np.abs(np.asarray(logs) - np.log(KNOWN[:, 1]))
    print(f"Mean squared error of the logarithms {losses[0]:.3g} at first, {losses[-1]:.3g} after {len(losses)} steps")
    print(f"Clearances are wrong by {100 * np.median(error):.1f} % in the median, by {100 * error.max():.1f} % at most")
    draw(path, jnp.exp(logs))


if __name__ == "__main__":
    main(picture(__file__))
