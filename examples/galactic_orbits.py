"""The Sun's orbit in the Milky Way, back to where it was born, and its siblings, by galax.

galax has potentials of galaxies, and solves orbits in them by Diffrax through diffraxtra. The position and velocity of the
Sun are those of Astropy's Galactocentric frame. The orbit runs back over 4.6 billion years to the Sun's birth place. Stars
that were born there, with velocities that differ by 1 km/s, then fly to today. The derivative of the birth place for today's
velocity says how far it is known.

One argument of galax's `OrbitSolver` makes the steps ours: `OrbitSolver(pdx.ParallelSolver(dfx.Tsit5()))`. Prints the birth
place, and how long the solves take beside the same program with Diffrax's solver. Draws orbit, siblings and birth places.

    python examples/galactic_orbits.py [picture.png]

Needs `pip install '.[examples,packages]'` and Python 3.12.
"""
# pyright: reportMissingImports=false

import astropy.coordinates as coordinates
import astropy.units as units
import diffrax as dfx
import galax.dynamics as gd
import galax.potential as gp
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from timing import Case, picture, report, SOLVERS

import parallel_diffrax as pdx


jax.config.update("jax_enable_x64", True)

# Distances in kpc, times in Myr, velocities in kpc / Myr.
AGE, SIBLINGS = 4600.0, 128
KM_PER_S = (1 * units.km / units.s).to_value(units.kpc / units.Myr)
FIELD = gd.fields.HamiltonianField(gp.MilkyWayPotential2022())


def sun() -> tuple[jax.Array, jax.Array]:
    """Position and velocity today."""
    frame = coordinates.galactocentric_frame_defaults.get_from_registry("v4.0")["parameters"]
    height = frame["z_sun"].to_value(units.kpc)
    distance = frame["galcen_distance"].to_value(units.kpc)
    velocity = frame["galcen_v_sun"].xyz.to_value(units.km / units.s)
    return jnp.array([-np.sqrt(distance**2 - height**2), 0.0, height]), KM_PER_S * jnp.asarray(velocity)


POSITION, VELOCITY = sun()


def flight(way, t0: float, t1: float, num_times: int = 2):
    """A function from position and velocity at `t0` to both at equal times until `t1`. Tolerances (1e-8), controller and
    forward mode are galax's own."""
    solver = gd.OrbitSolver(way(dfx.Tsit5()))
    ts = jnp.linspace(t0, t1, num_times)[1:]
    return lambda position, velocity: solver.solve(FIELD, (position, velocity), t0, t1, saveat=ts).ys


def birth(way):
    """Position and velocity at the Sun's birth, from today's velocity."""
    back = flight(way, 0.0, -AGE)
    return lambda velocity: tuple(x[-1] for x in back(POSITION, velocity))


def siblings(way):
    """Where stars are today that were born with the Sun, from their velocities."""
    forth = flight(way, -AGE, 0.0)
    return jax.vmap(lambda position, velocity: forth(position, velocity)[0][-1], in_axes=(None, 0))


# By Diffrax's own steps.
BIRTH_PLACE, BIRTH_VELOCITY = jax.jit(birth(SOLVERS[1]))(VELOCITY)
SPREAD = KM_PER_S * np.random.default_rng(0).normal(size=(SIBLINGS, 3))
CASES = {
    "derivative of the birth place": Case(lambda way: jax.jacfwd(birth(way)), (VELOCITY,), 1e-5, SOLVERS),
    f"{SIBLINGS} siblings": Case(siblings, (BIRTH_PLACE, BIRTH_VELOCITY + SPREAD), 1e-6, SOLVERS),
}


def draw(path, derivative, today):
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    orbit, _ = jax.jit(flight(pdx.ParallelSolver, 0.0, -AGE, 2001))(POSITION, VELOCITY)
    left.plot(orbit[:, 0], orbit[:, 1], lw=0.4, color="black", alpha=0.5, label="the Sun's orbit")
    left.plot(today[:, 0], today[:, 1], ".", ms=5, label="siblings today")
    left.plot(*POSITION[:2], "*", ms=14, color="C1", mec="black", label="the Sun today")
    left.plot(*BIRTH_PLACE[:2], "P", ms=9, color="C2", mec="black", label="birth place")
    left.set(xlabel="x, kpc", ylabel="y, kpc", aspect="equal", title="4.6 billion years in the plane of the Milky Way")
    left.legend(loc="center")
    places = jax.jit(jax.vmap(birth(pdx.ParallelSolver)))(VELOCITY + SPREAD)[0]
    linear = BIRTH_PLACE + SPREAD @ derivative.T
    right.plot(places[:, 0], places[:, 1], ".", ms=5, label="solved back")
    right.plot(linear[:, 0], linear[:, 1], ".", ms=3, color="C3", label="by the derivative")
    right.set(
        xlabel="x, kpc", ylabel="y, kpc", aspect="equal", title="birth places for velocities that differ by 1 km/s"
    )
    right.legend()
    figure.savefig(path, dpi=100)


def main(path):
    print(f"On this {jax.default_backend().upper()}, Tsit5 with galax's PIDController at 1e-8:")
    (derivative, _), today = report(CASES).values()
    print(f"Born {float(jnp.hypot(*BIRTH_PLACE[:2])):.2f} kpc from the centre (today {float(-POSITION[0]):.2f})")
    moves = KM_PER_S * np.linalg.norm(derivative, axis=0)
    print("One km/s moves the birth place by " + ", ".join(f"{x:.2f}" for x in moves) + " kpc (along x, y, z)")
    distances = np.linalg.norm(today - POSITION, axis=1)
    print(f"Siblings today: {int(np.sum(distances < 1))} of {SIBLINGS} within 1 kpc of the Sun")
    draw(path, derivative, today)


if __name__ == "__main__":
    main(picture(__file__))
