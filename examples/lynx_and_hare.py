"""Lynx and hare at Hudson Bay: what twenty years of pelts tell about predator and prey, by dynestyx and NumPyro.

The Hudson's Bay Company counted the pelts of hares and lynxes that it bought, here in thousands for 1900 to 1920. The model
is that of Lotka and Volterra, with logarithmic noise on the counts. dynestyx makes it a part of a NumPyro program and solves
it by Diffrax, with 20000 steps of Tsit5 for every gradient (its default, `dt0 = 0.001`). NUTS samples the four rates, the
numbers at the beginning and the noise.

One argument of dynestyx's configuration makes the steps ours: `ODESimulatorConfig(solver=pdx.ParallelSolver(dfx.Tsit5()))`.
Prints the posterior, and how long a density and its gradient take beside the same program with Diffrax's solver. Draws
counts, trajectories and rates.

    python examples/lynx_and_hare.py [picture.png]

Needs `pip install '.[examples,packages]'` and Python 3.12.
"""
# pyright: reportMissingImports=false

import diffrax as dfx
import dynestyx as dsx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from timing import Case, picture, report, SOLVERS

import parallel_diffrax as pdx


jax.config.update("jax_enable_x64", True)

# Thousands of pelts, one count a year (Hewitt, 1921).
HARES = "30 47.2 70.2 77.4 36.3 20.6 18.1 21.4 22 25.4 27.1 40.3 57 76.6 52.3 19.5 11.2 7.6 14.6 16.2 24.7"
LYNXES = "4 6.1 9.8 35.2 59.4 41.7 19 13 8.3 9.1 7.4 8 12.3 19.5 45.7 51.1 29.7 15.8 9.7 10.1 8.6"
PELTS = jnp.array([[float(x) for x in counts.split()] for counts in (HARES, LYNXES)]).T
YEARS = jnp.arange(float(len(PELTS)))
NAMES = ("births of hares", "hares caught by a lynx", "deaths of lynxes", "lynxes fed by a hare")


def dynamics(rates, noise) -> dsx.DynamicalModel:
    """Rates per year, and the standard deviations of the logarithms of the counts."""
    births, caught, deaths, fed = rates

    def drift(x, u, t):
        hares, lynxes = x
        return jnp.stack([hares * (births - caught * lynxes), lynxes * (fed * hares - deaths)])

    def counts(x, u, t):
        # dynestyx asks for the shape at zero, where there is no logarithm.
        return dist.LogNormal(jnp.log(jnp.maximum(x, 1e-9)), noise).to_event(1)

    return dsx.DynamicalModel(
        initial_condition=dist.LogNormal(jnp.full(2, jnp.log(10.0)), 1.0).to_event(1),
        state_evolution=dsx.ContinuousTimeStateEvolution(drift=drift),
        observation_model=counts,
    )


def configuration(way) -> dsx.ODESimulatorConfig:
    """dynestyx's defaults, with the solver changed. A proposal whose solve fails is rejected."""
    return dsx.ODESimulatorConfig(solver=way(dfx.Tsit5()), throw=False)


def density(way):
    """The logarithm of the density of the counts, from rates, initial numbers and noise."""
    settings = configuration(way).diffeqsolve_settings

    def value(rates, start, noise):
        return dsx.log_prob(
            dynamics(rates, noise), state_path_params=start, state_path_param_times=YEARS[:1], obs_times=YEARS,
            obs_values=PELTS, ode_diffeqsolve_settings=settings,
        )  # fmt: skip

    return value


POINT = jnp.array([0.55, 0.028, 0.8, 0.024]), jnp.array([33.0, 5.9]), jnp.array([0.25, 0.25])
CASES = {
    "density": Case(density, POINT, ways=SOLVERS),
    "gradient of the density": Case(lambda way: jax.grad(density(way), argnums=(0, 1, 2)), POINT, 1e-6, SOLVERS),
}


def model():
    """The NumPyro program: priors, and the solve with its observations."""
    typical = jnp.array([1.0, 0.05, 1.0, 0.05])
    spread = jnp.array([0.5, 0.05, 0.5, 0.05])
    rates = numpyro.sample("rates", dist.TruncatedNormal(typical, spread, low=0.0).to_event(1))
    noise = numpyro.sample("noise", dist.LogNormal(-jnp.ones(2), 1.0).to_event(1))
    dsx.sample("pelts", dynamics(rates, noise), obs_times=YEARS, obs_values=PELTS)


def posterior(way, warmup: int = 300, samples: int = 300) -> dict[str, np.ndarray]:
    """Samples by NUTS, one in a row of each array."""
    rates, start, noise = POINT
    guess = {"rates": rates, "noise": noise, "pelts_state_path_params": start[None]}
    with dsx.LatentPathBuilder(configuration(way)):
        kernel = numpyro.infer.NUTS(model, init_strategy=numpyro.infer.init_to_value(values=guess))
        sampler = numpyro.infer.MCMC(kernel, num_warmup=warmup, num_samples=samples, progress_bar=False)
        sampler.run(jr.key(0))
    return {name: np.asarray(x) for name, x in sampler.get_samples().items()}


def trajectories(samples, years):
    """The numbers at `years`, for some of the samples."""

    def solve(rates, start):
        drift = dynamics(rates, jnp.ones(2)).state_evolution.drift
        term, controller = dfx.ODETerm(lambda t, x, args: drift(x, None, t)), dfx.PIDController(rtol=1e-6, atol=1e-6)
        return pdx.diffeqsolve(
            term, dfx.Tsit5(), years[0], years[-1], None, start, saveat=dfx.SaveAt(ts=years),
            stepsize_controller=controller,
        ).ys  # fmt: skip

    return jax.jit(jax.vmap(solve))(samples["rates"][::6], samples["pelts_state_path_params"][::6, 0])


def draw(path, samples):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[2, 1], layout="constrained")
    years = jnp.linspace(0.0, YEARS[-1], 401)
    found = trajectories(samples, years)
    for k, name in enumerate(("hares", "lynxes")):
        left.plot(1900 + years, found[..., k].T, color=f"C{k}", lw=0.8, alpha=0.2)
        left.plot(1900 + YEARS, PELTS[:, k], "o", color=f"C{k}", ms=5, mec="black", label=name)
    left.set_xticks(range(1900, 1921, 4))
    left.set(xlabel="year", ylabel="thousands of pelts", title="counts, and trajectories of the posterior")
    left.legend()
    rates = samples["rates"]
    right.plot(rates[:, 0], rates[:, 2], ".", ms=4, alpha=0.6)
    right.set(xlabel=f"{NAMES[0]}, per year", ylabel=f"{NAMES[2]}, per year", title="samples of NUTS")
    figure.savefig(path, dpi=110)


def main(path):
    print(f"On this {jax.default_backend().upper()}, {round(float(YEARS[-1]) / 1e-3)} steps of Tsit5:")
    report(CASES)
    samples = posterior(pdx.ParallelSolver)
    for k, name in enumerate(NAMES):
        rates = samples["rates"][:, k]
        print(f"  {name}: {rates.mean():.3g} ± {rates.std():.1g} per year")
    print("  noise of the logarithms: " + ", ".join(f"{x:.2f}" for x in samples["noise"].mean(axis=0)))
    draw(path, samples)


if __name__ == "__main__":
    main(picture(__file__))
