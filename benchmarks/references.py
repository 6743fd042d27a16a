"""Reference end states for the work-precision comparison, more accurate than any solver in it.

    python -m benchmarks.references

writes `references.json`. Smooth problems are solved by SciPy's DOP853 at a relative tolerance of 1e-13, stiff problems by
SciPy's Radau method at 1e-12, and the Kepler problem in closed form. The file makes SciPy unnecessary for a benchmark run.
"""

import json
import pathlib

import jax
import numpy as np

from . import smooth_problems, stiff_problems


FILE = pathlib.Path(__file__).parent / "references.json"
STIFF = ["van der Pol, mu = 10", "Robertson, T = 1e5", "HIRES", "Robertson, T = 1e11"]


def load() -> dict[str, np.ndarray]:
    """The end state of each problem, by name."""
    return {name: np.array(state) for name, state in json.loads(FILE.read_text()).items()}


def smooth_reference(problem: smooth_problems.Smooth) -> np.ndarray:
    """The end state by SciPy's DOP853, of order 8, at a relative tolerance of 1e-13."""
    from scipy.integrate import solve_ivp

    field = jax.jit(lambda t, y: problem.field(t, y, problem.args))
    return solve_ivp(
        lambda t, y: np.asarray(field(t, y)), (0.0, problem.t1), problem.y0, method="DOP853", rtol=1e-13, atol=1e-15
    ).y[:, -1]


def kepler_reference(problem: smooth_problems.Smooth) -> np.ndarray:
    """The end state in closed form, for a semi-major axis of 1 and a start at the perihelion `x = 1 - e`."""
    eccentricity = 1 - problem.y0[0]
    anomaly = problem.t1
    for _ in range(50):
        residual = anomaly - eccentricity * np.sin(anomaly) - problem.t1
        anomaly -= residual / (1 - eccentricity * np.cos(anomaly))
    across = (1 - eccentricity**2) ** 0.5
    rate = 1 / (1 - eccentricity * np.cos(anomaly))
    return np.array(
        [
            np.cos(anomaly) - eccentricity,
            across * np.sin(anomaly),
            -rate * np.sin(anomaly),
            rate * across * np.cos(anomaly),
        ]
    )


def main():
    jax.config.update("jax_enable_x64", True)
    states = {}
    for name, problem in smooth_problems.PROBLEMS.items():
        make = kepler_reference if problem.field is smooth_problems.kepler else smooth_reference
        states[name] = make(problem)
    for name in STIFF:
        states[name] = stiff_problems.PROBLEMS[name].reference()
    for name, state in states.items():
        print(name, state)
        assert np.all(np.isfinite(state)), name
    FILE.write_text(json.dumps({name: state.tolist() for name, state in states.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
