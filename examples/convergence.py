"""Convergence of the methods of the family, measured and predicted by theory.

Newton's method converges quadratically; quasi-Newton, Picard and Jacobi converge linearly. Jacobi solves at least one step
per iteration.

`python examples/convergence.py` writes `convergence.png` next to this file.
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import parallel_diffrax as pdx


matplotlib.use("Agg")
import matplotlib.pyplot as plt


jax.config.update("jax_enable_x64", True)

NUM_STEPS, SIZE, ITERATIONS = 200, 8, 24
rng = np.random.default_rng(0)
rotation = jnp.asarray(np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0])
inputs = jnp.asarray(0.3 * rng.normal(size=(NUM_STEPS, SIZE)))


def step(y, x):
    """One step of a slowly contracting, weakly coupled, driven recurrence."""
    return 0.99 * y + 0.004 * jnp.sin(rotation @ y) + x, None


METHODS = {
    "Newton": pdx.jacobians.Dense(),
    "quasi-Newton (diagonal)": pdx.jacobians.Diagonal(),
    "Picard": pdx.jacobians.Identity(),
    "Jacobi": pdx.jacobians.Zero(),
}


def main():
    """Runs every method, prints its rates and draws its errors."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    print(f"{'':26}{'measured rates (first iterations)':38}{'predicted':38}bound")
    for color, (name, jacobian) in enumerate(METHODS.items()):
        root_finder = pdx.ParallelNewton(jacobian=jacobian)
        history = pdx.diagnostics.convergence_history(
            step, jnp.zeros(SIZE), inputs, root_finder=root_finder, num_iterations=ITERATIONS
        )
        total = np.linalg.norm(history.error, axis=1)
        # Smaller errors are rounding errors, which follow no theory.
        last = int(np.argmax(total < 1e-12)) or ITERATIONS
        measured, predicted = np.asarray(history.measured_rate), np.asarray(history.predicted_rate)
        rates = [" ".join(f"{rate:6.3f}" for rate in part[:5]) for part in (measured, predicted)]
        print(f"{name:26}{rates[0]:38}{rates[1]:38}{float(history.rate_bound):.3f}")
        left.semilogy(total[: last + 1], "o-", color=f"C{color}", label=name, markersize=4)
        if not jacobian.exact:
            left.semilogy(np.arange(1, last + 1), (predicted * total[:-1])[:last], "k:", linewidth=1)
        if name in ("Newton", "Jacobi"):
            for k in range(0, min(last, 20) + 1, 1 if name == "Newton" else 5):
                residual = np.maximum(np.asarray(history.residual[k]), 1e-17)
                style = dict(color=f"C{color}", alpha=0.35 + 0.6 * k / 20, linewidth=1)
                right.semilogy(residual, label=name if k == 0 else None, **style)
    left.set(xlabel="iteration", ylabel="error", title="measured, and predicted (dotted)")
    right.set(xlabel="step", ylabel="residual", title="every iteration (of Jacobi every fifth)")
    left.set_xlim(-1, 34)
    left.legend(loc="lower right")
    right.legend()
    path = pathlib.Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=110)
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
