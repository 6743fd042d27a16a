"""Diffrax's own tests with every solver wrapped in a `ParallelSolver`.

    python -m tests.conformance FOLDER [--steps 4] [--adjoint] [--default] [--processes 2] [PYTEST ARGUMENTS, FILES]

`FOLDER` is a checkout of Diffrax at the tag of the installed version; its tests stay out of this repository. Every call of
`diffrax.diffeqsolve` in them is made with windows of `--steps` fine steps; a constant step size and the steps of `StepTo`
stay the fine steps (`Windows`). They are solved in parallel where that is possible (`AdaptivePolicy`); with `--default`, the
number of steps and the policy are the defaults. With `--adjoint`, `ParallelAdjoint` replaces the default adjoint. The tests
run under JAX's strict settings, which Diffrax's `conftest.py` sets. `tests/conformance.md` lists what fails, and why.
"""

import argparse
import functools
import importlib
import os
import pathlib
import sys


# Of Diffrax's test files, those that solve differential equations.
FILES = (
    *("adaptive_stepsize_controller", "adjoint", "detest", "event", "integrate", "progress_meter"),
    *("saveat_solution", "sde1", "sde2", "solver", "step_to", "vmap"),
)


def install(num_steps: int | None, adjoint: bool):
    """Replaces `diffrax.diffeqsolve`."""
    import diffrax as dfx

    import parallel_diffrax as pdx

    original = dfx.diffeqsolve

    @functools.wraps(getattr(original, "__wrapped__", original))
    def diffeqsolve(terms, solver, t0=None, t1=None, dt0=None, y0=None, args=None, **options):
        if isinstance(solver, dfx.AbstractSolver) and not isinstance(solver, pdx.ParallelSolver):
            controller = options.get("stepsize_controller", dfx.ConstantStepSize())
            listed = type(controller) is dfx.StepTo
            policy = pdx.policies.CostPolicy() if num_steps is None else pdx.AdaptivePolicy()
            solver = pdx.ParallelSolver(solver, num_steps, policy=policy, ts=controller.ts if listed else None)
            if listed or (type(controller) is dfx.ConstantStepSize and dt0 is not None):
                options["stepsize_controller"] = pdx.Windows()
            if adjoint and "adjoint" not in options:
                options["adjoint"] = pdx.ParallelAdjoint()
        return original(terms, solver, t0, t1, dt0, y0, args, **options)

    dfx.diffeqsolve = diffeqsolve


# As a plugin of pytest, in the processes that `main` starts.
if "PARALLEL_DIFFRAX_CONFORMANCE" in os.environ:
    _steps, _adjoint = os.environ["PARALLEL_DIFFRAX_CONFORMANCE"].split(",")
    install(None if _steps == "None" else int(_steps), _adjoint == "True")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--adjoint", action="store_true")
    parser.add_argument("--default", action="store_true")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options, more = parser.parse_known_args()
    # It sets the flags of XLA with which programs compile in less than half of the time.
    importlib.import_module("tests.conftest")
    root = str(pathlib.Path(__file__).resolve().parents[1])
    environment = os.environ | {
        "PARALLEL_DIFFRAX_CONFORMANCE": f"{None if options.default else options.steps},{options.adjoint}",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    # Diffrax's own options would have jaxtyping look at its modules, which are imported here before.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "tests.conformance", "-p", "no:warnings"]
    # Verbose, so that a run that is cut short shows what it did.
    command += ["-v", "-rf", "--tb=line", "-n", str(options.processes), *more]
    if not any(argument.startswith("test/") for argument in more):
        command += [f"test/test_{name}.py" for name in FILES]
    os.chdir(options.folder)
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    main()
