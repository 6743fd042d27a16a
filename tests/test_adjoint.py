"""`ParallelAdjoint` changes how fast a solve is and nothing else: every output is that of Diffrax's own loop over windows to
1e-12, that of sequential Diffrax to 1e-9, and so are derivatives; no window is solved a second time for them.
"""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import parallel_diffrax as pdx
from parallel_diffrax._ode._gaussian_elimination import GaussianElimination

from .problems import DRIVEN, DRIVEN_ARGS, DRIVEN_Y0, only_full, parallel_solver


STEPS, WINDOWS = 12, 4
CHEAP = {"predictor": pdx.ConstantPredictor(), "policy": pdx.policies.ParallelOnly()}
GRID = jnp.array([0.0, 0.01, 0.2, 0.24, 0.25, 0.5, 0.77, 0.99, 1.0])
PARALLEL, STOCK = pdx.ParallelAdjoint(), dfx.ForwardMode()


def observed(t, y, args):
    return {"t": t, "y": args[0] * y, "nothing": None}


def close(got, want, tolerance, skip=()):
    """Every leaf is the same up to the tolerance, where infinite or NaN exactly."""
    got, want = (jax.tree_util.tree_leaves_with_path(x) for x in (got, want))
    for (path, g), (_, w) in zip(got, want, strict=True):
        name = jax.tree_util.keystr(path)
        if not any(part in name for part in skip):
            np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance, err_msg=name)


# Forwards; backwards; no time at all; more windows than are allowed.
T0S, T1S = jnp.array([0.0, 4.0, 2.0, 1.0]), jnp.array([4.0, 0.5, 2.0, 5.0])
SPANS = jnp.array([1.0, 0.875, 0.5, 0.5])
Y0S = jnp.stack([DRIVEN_Y0, -DRIVEN_Y0, 2 * DRIVEN_Y0, 0.5 * DRIVEN_Y0])


def every_form(steps, t0, t1):
    """All that `SaveAt` can save, with `steps` steps between the ends of windows."""
    ts = t0 + (t1 - t0) * GRID
    return dfx.SaveAt(
        subs={
            "all": dfx.SubSaveAt(t0=True, t1=True, ts=ts, fn=observed),
            "steps": [dfx.SubSaveAt(steps=steps), dfx.SubSaveAt(steps=2 * steps, t1=True, ts=ts[2:-1])],
            "none": None,
            "end": dfx.SubSaveAt(t1=True),
        },
        dense=True,
        made_jump=True,
    )


@functools.cache
def solved(base, adjoint, batched):
    """Every form, by windows or (without an adjoint) in sequence."""
    solver = base if adjoint is None else parallel_solver(base, STEPS, **CHEAP)
    steps = STEPS if adjoint is None else 1
    allowed = (WINDOWS + 1) * steps

    def solve(t0, t1, span, y0):
        dt0 = jnp.where(t0 <= t1, 1, -1) * span / steps
        saveat = every_form(steps, t0, t1)
        return dfx.diffeqsolve(
            *(DRIVEN, solver, t0, t1, dt0, y0, DRIVEN_ARGS),
            saveat=saveat, max_steps=allowed, throw=False, adjoint=STOCK if adjoint is None else adjoint,
        )  # fmt: skip

    if batched:
        return jax.jit(jax.vmap(solve))(T0S, T1S, SPANS, Y0S)
    members = [jax.jit(solve)(*member) for member in zip(T0S, T1S, SPANS, Y0S)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


IMPLICIT = dfx.ImplicitEuler(root_finder=optx.Newton(1e-12, 1e-12, linear_solver=GaussianElimination()))


@pytest.mark.parametrize(
    "base, batched", only_full((dfx.Heun(), True), (IMPLICIT, False)), ids=["Heun, in a batch", "ImplicitEuler"]
)
def test_every_form_of_saveat_is_that_of_the_stock_loop_and_of_sequential_diffrax(base, batched):
    got, stock, sequential = (solved(base, adjoint, batched) for adjoint in (PARALLEL, STOCK, None))
    assert jax.tree.structure(got) == jax.tree.structure(stock)
    close(got, stock, 1e-12)
    np.testing.assert_array_equal(got.result == dfx.RESULTS.successful, [True, True, True, False])
    np.testing.assert_array_equal(got.result == dfx.RESULTS.max_steps_reached, [False, False, False, True])
    close((got.ts, got.ys), (sequential.ts, sequential.ys), 1e-9)
    times = T0S + 0.3 * (T1S - T0S)
    inside = [jax.vmap(lambda sol, t: sol.evaluate(t))(sol, times) for sol in (got, sequential)]
    close(*inside, 1e-9)


# Derivatives of a loss on saved states, through a controller that rejects, with a jump of the field, in a batch whose
# members need different numbers of windows.
JUMP = 1.3


def kicked(t, y, args):
    return jnp.stack([y[1], -args[0] * jnp.sin(y[0]) - args[1] * y[1] + jnp.where(t < JUMP, 0.0, 2.0)])


def loss_of(adjoint, meter=dfx.NoProgressMeter()):
    controller = dfx.ClipStepSizeController(dfx.PIDController(1e-5, 1e-5), jump_ts=[JUMP])
    solver = parallel_solver(dfx.Bosh3(), 8, root_find_max_steps=6, **CHEAP)
    saveat = dfx.SaveAt(ts=3 * GRID, t1=True, fn=observed, controller_state=True)

    def loss(y0, args, t1):
        sol = dfx.diffeqsolve(
            *(dfx.ODETerm(kicked), solver, 0.0, t1, 3.0, y0, args),
            saveat=saveat, stepsize_controller=controller, max_steps=20, throw=False, adjoint=adjoint, progress_meter=meter,
        )  # fmt: skip
        weights = jnp.cos(jnp.arange(GRID.size + 1.0))
        return jnp.sum(weights[:, None] * sol.ys["y"] ** 2), (sol.ys, sol.stats, sol.controller_state)

    return loss


@pytest.mark.full
def test_gradients_in_a_batch_of_adaptive_windows_are_those_of_the_stock_loop():
    y0s, t1s = jnp.stack([DRIVEN_Y0, 3 * DRIVEN_Y0, 0.1 * DRIVEN_Y0]), jnp.array([3.0, 4.0, 3.5])
    gradient = jax.value_and_grad(loss_of(PARALLEL), argnums=(0, 1), has_aux=True)
    (value, aux), grads = jax.jit(jax.vmap(gradient, in_axes=(0, None, 0)))(y0s, DRIVEN_ARGS, t1s)
    stats = aux[1]
    assert len(set(stats["num_steps"].tolist())) > 1 and int(jnp.max(stats["num_rejected_steps"])) > 0

    # The stock loop compiles fastest for one member, forwards.
    direction = (jnp.array([0.3, -0.7]), jnp.array([0.2, 1.1]))

    @jax.jit
    def stock(y0, t1):
        loss = loss_of(dfx.ForwardMode())
        return jax.jvp(lambda y0, args: loss(y0, args, t1), (y0, DRIVEN_ARGS), direction, has_aux=True)

    for k in range(3):
        want, derivative, want_aux = stock(y0s[k], t1s[k])
        got = sum(g[k] @ d for g, d in zip(grads, direction))
        member = jax.tree.map(lambda x, k=k: x[k] if jnp.ndim(x) else x, (value, aux))
        close((got, *member), (derivative, want, want_aux), 1e-9)


def test_one_window_has_the_derivatives_of_sequential_diffrax_in_both_modes_and_shows_progress(capsys):
    def loss(args, solver, num_steps, adjoint, **kwargs):
        saveat = dfx.SaveAt(ts=3 * GRID, fn=observed)
        kwargs = {"saveat": saveat, "max_steps": num_steps, "adjoint": adjoint, **kwargs}
        sol = dfx.diffeqsolve(DRIVEN, solver, 0.0, 3.0, 3.0 / num_steps, DRIVEN_Y0, args, **kwargs)
        return jnp.sum(jnp.cos(jnp.arange(2.0 * GRID.size)).reshape(-1, 2) * sol.ys["y"] ** 2)

    solver = parallel_solver(dfx.Heun(), 40, **CHEAP)
    ours = lambda args: loss(args, solver, 1, PARALLEL, progress_meter=dfx.TextProgressMeter())
    theirs = lambda args: loss(args, dfx.Heun(), 40, dfx.RecursiveCheckpointAdjoint())
    tangent = jnp.array([0.3, -0.7])
    both = jax.jit(lambda args: (jax.grad(ours)(args), jax.jvp(ours, (args,), (tangent,))[1]))
    gradient, derivative = jax.block_until_ready(both(DRIVEN_ARGS))
    jax.effects_barrier()
    # Of both solves, in whatever order.
    assert sorted(capsys.readouterr().out.split()) == ["0.00%", "0.00%", "100.00%", "100.00%"]
    want = jax.jit(jax.grad(theirs))(DRIVEN_ARGS)
    close((gradient, derivative), (want, want @ tangent), 1e-9)


class Marked(pdx.ConstantPredictor):
    """Leaves a trace in whatever program makes a guess."""

    def predict(self, window, recurrence, start_level):
        prediction = super().predict(window, recurrence, start_level)
        mark = lambda y: y + 0 * jax.lax.digamma(1 + y**2)
        return eqx.tree_at(lambda prediction: prediction.y, prediction, replace_fn=mark)


def occurrences(jaxpr, name):
    inner = [
        x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr) if is_jaxpr(x)
    ]
    return sum(eqn.primitive.name == name for eqn in jaxpr.eqns) + sum(
        occurrences(getattr(x, "jaxpr", x), name) for x in inner
    )


ROUNDING = {"now": 0.0}


def perturbed(x, t):
    """`x` times one plus what is in `ROUNDING` when the program runs: rounding that is different from pass to pass."""
    now = jax.pure_callback(
        lambda t: np.asarray(ROUNDING["now"], t.dtype),
        jnp.zeros_like(t),
        lax.stop_gradient(t),
        vmap_method="sequential",
    )
    return x * (1 + now)


class Perturbed(dfx.AbstractStepSizeController):
    """Another controller, whose error estimates are perturbed."""

    controller: dfx.AbstractStepSizeController

    def wrap(self, direction):
        return Perturbed(self.controller.wrap(direction))

    def init(self, *args):
        return self.controller.init(*args)

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, *rest):
        return self.controller.adapt_step_size(t0, t1, y0, y1, args, perturbed(y_error, t0), *rest)


@jax.custom_vjp
def perturb_the_backward_pass(x):
    return x


def _perturb(_, cotangent):
    ROUNDING["now"] = 0.5
    return (cotangent,)


perturb_the_backward_pass.defvjp(lambda x: (x, None), _perturb)


@pytest.mark.parametrize("event", [False, *only_full(True)], ids=["no event", "event"])
def test_the_backward_pass_decides_nothing_again(event):
    """The error estimates of the second pass are 1.5 times those of the first. A controller amplifies rounding in the same
    way; here it is exaggerated."""
    solver = parallel_solver(dfx.Bosh3(), 16, **CHEAP)
    controller = Perturbed(dfx.PIDController(rtol=1e-5, atol=1e-7))
    options = {"event": dfx.Event(lambda t, y, args, **kwargs: y[1] - 0.7)} if event else {}

    def loss(args, last):
        sol = dfx.diffeqsolve(
            DRIVEN, solver, 0.0, 4.0, 0.5, DRIVEN_Y0, args, saveat=dfx.SaveAt(ts=jnp.array([0.3, 0.6]), t1=True),
            stepsize_controller=controller, max_steps=32, adjoint=adjoint, **options,
        )  # fmt: skip
        ys = jnp.where(jnp.isfinite(sol.ys), sol.ys, 0)
        return last(jnp.sum(ys)), sol.stats["num_rejected_steps"]

    ROUNDING["now"] = 0.0
    adjoint = dfx.DirectAdjoint()
    want, rejected = jax.grad(loss, has_aux=True)(DRIVEN_ARGS, lambda x: x)
    assert rejected > 0
    adjoint = PARALLEL
    got, _ = jax.grad(loss, has_aux=True)(DRIVEN_ARGS, perturb_the_backward_pass)
    assert ROUNDING["now"] == 0.5
    ROUNDING["now"] = 0.0
    np.testing.assert_allclose(got, want, rtol=1e-9)


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize("max_steps", [1, 100])
def test_the_backward_pass_makes_no_second_solve_whatever_the_number_of_windows(max_steps):
    solver = parallel_solver(dfx.Heun(), 40, predictor=Marked(), policy=pdx.policies.ParallelOnly())

    def guesses(adjoint):
        def loss(args):
            saveat = dfx.SaveAt(ts=3 * GRID)
            kwargs = {"saveat": saveat, "max_steps": max_steps, "adjoint": adjoint}
            return jnp.sum(dfx.diffeqsolve(DRIVEN, solver, 0.0, 3.0, 1.0, DRIVEN_Y0, args, **kwargs).ys)

        return occurrences(jax.make_jaxpr(jax.grad(loss))(DRIVEN_ARGS).jaxpr, "digamma")

    assert guesses(PARALLEL) == 1
    if max_steps == 1:
        assert guesses(dfx.RecursiveCheckpointAdjoint()) == 2


def test_what_it_cannot_do_raises_and_says_what_to_use():
    def solve(solver, term=DRIVEN, args=DRIVEN_ARGS, **kwargs):
        return dfx.diffeqsolve(term, solver, 0.0, 1.0, 1.0, DRIVEN_Y0, args, adjoint=PARALLEL, **kwargs)

    with pytest.raises(ValueError, match=r"solver=ParallelSolver\(Heun"):
        solve(dfx.Heun())
    noise = dfx.UnsafeBrownianPath((2,), jax.random.key(0))
    term = dfx.MultiTerm(DRIVEN, dfx.ControlTerm(lambda t, y, args: jnp.eye(2), noise))
    with pytest.raises(ValueError, match=r"UnsafeBrownianPath.*VirtualBrownianTree"):
        solve(parallel_solver(dfx.Heun(), 4, **CHEAP), term)
    unbounded = lambda args: jnp.sum(solve(parallel_solver(dfx.Heun(), 4, **CHEAP), args=args, max_steps=None).ys)
    with pytest.raises(RuntimeError, match="Set `max_steps` to the number of windows"):
        jax.grad(unbounded)(DRIVEN_ARGS)
