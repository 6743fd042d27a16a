"""Rewrites a function of small arrays as a function of scalars, so that many sequential steps can be one kernel.

On a GPU, a sequential step costs as much as the launches of its kernels. XLA does not fuse through the slices and
concatenations in vector fields (`jnp.stack([y[1], -y[0]])`), since that would repeat work. A Runge-Kutta step of a
two-dimensional field is therefore three or more kernels. In scalars, XLA compiles eight such steps into one kernel (1.4 us a
step instead of 5.6 us on an H200: FitzHugh-Nagumo, Tsit5, float64), and a whole loop can be one kernel (`_loop.py`).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree


# Applied to each entry: none of their parameters depends on a shape.
_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy cos cosh div eq
    erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma digamma log log1p logistic lt max min mul ne
    neg nextafter not or pow real imag rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh
    xor""".split()
)
_CALLS = dict.fromkeys(("pjit", "jit", "remat2", "checkpoint"), "jaxpr")
_CALLS |= dict.fromkeys(("closed_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr")


def _inner(eqn) -> jex.core.ClosedJaxpr:
    inner = eqn.params[_CALLS[eqn.primitive.name]]
    return inner if isinstance(inner, jex.core.ClosedJaxpr) else jex.core.ClosedJaxpr(inner, ())


def _combine_along(axes, x: np.ndarray, op) -> np.ndarray:
    kept = [k for k in range(x.ndim) if k not in axes]
    out = np.empty([x.shape[k] for k in kept], dtype=object)
    moved = np.transpose(x, [*kept, *axes]).reshape(*out.shape, -1)
    for index in np.ndindex(*out.shape):
        total, *rest = moved[index]
        for term in rest:
            total = op(total, term)
        out[index] = total
    return out


def _dot_general(eqn, x, y):
    (cx, cy), (bx, by) = eqn.params["dimension_numbers"]
    x = np.transpose(x, [*bx, *(k for k in range(x.ndim) if k not in (*bx, *cx)), *cx])
    y = np.transpose(y, [*by, *(k for k in range(y.ndim) if k not in (*by, *cy)), *cy])
    batch, contracted = x.shape[: len(bx)], math.prod(x.shape[x.ndim - len(cx) :])
    x, y = (z.reshape(*batch, -1, contracted) for z in (x, y))
    out = np.empty((*batch, x.shape[-2], y.shape[-2]), dtype=object)
    for *b, j, k in itertools.product(*map(range, out.shape)):
        terms = [p * q for p, q in zip(x[(*b, j)], y[(*b, k)])]
        out[(*b, j, k)] = sum(terms[1:], terms[0])
    return out.reshape(eqn.outvars[0].aval.shape)


def _broadcast_in_dim(eqn, x, *_):
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    expanded = [1] * len(shape)
    for axis, dim in enumerate(dims):
        expanded[dim] = x.shape[axis]
    return np.broadcast_to(x.reshape(expanded), shape)


def _slice(eqn, x):
    p = eqn.params
    strides = p["strides"] or (1,) * x.ndim
    return x[tuple(map(slice, p["start_indices"], p["limit_indices"], strides))]


def _split(eqn, x):
    return np.split(x, np.cumsum(eqn.params["sizes"])[:-1], axis=eqn.params["axis"])


def _iota(eqn, *_):
    dtype, shape, axis = (eqn.params[name] for name in ("dtype", "shape", "dimension"))
    along = np.arange(shape[axis], dtype=dtype).reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return as_scalars(np.broadcast_to(along, shape))


# Primitives that move or combine entries.
_STRUCTURAL = {
    "broadcast_in_dim": _broadcast_in_dim,
    "iota": _iota,
    "reshape": lambda eqn, x, *_: x.reshape(eqn.params["new_sizes"]),
    "squeeze": lambda eqn, x: x.reshape(eqn.outvars[0].aval.shape),
    "expand_dims": lambda eqn, x: x.reshape(eqn.outvars[0].aval.shape),
    "transpose": lambda eqn, x: np.transpose(x, eqn.params["permutation"]),
    "rev": lambda eqn, x: np.flip(x, eqn.params["dimensions"]),
    "concatenate": lambda eqn, *xs: np.concatenate(xs, axis=eqn.params["dimension"]),
    "slice": _slice,
    "split": _split,
    "stack": lambda eqn, *xs: np.stack(xs, axis=eqn.params["axis"]),
    "unstack": lambda eqn, x: [
        np.take(x, [k], eqn.params["axis"]).reshape(v.aval.shape) for k, v in enumerate(eqn.outvars)
    ],
    "dot_general": _dot_general,
    "reduce_sum": lambda eqn, x: _combine_along(eqn.params["axes"], x, lambda a, b: a + b),
    "reduce_prod": lambda eqn, x: _combine_along(eqn.params["axes"], x, lambda a, b: a * b),
    "reduce_and": lambda eqn, x: _combine_along(eqn.params["axes"], x, lambda a, b: a & b),
    "reduce_or": lambda eqn, x: _combine_along(eqn.params["axes"], x, lambda a, b: a | b),
    "reduce_max": lambda eqn, x: _combine_along(eqn.params["axes"], x, jnp.maximum),
    "reduce_min": lambda eqn, x: _combine_along(eqn.params["axes"], x, jnp.minimum),
}


def _is_short(eqn) -> bool:
    """Whether the equation is a forward loop of known length, which can be unrolled."""
    return eqn.primitive.name == "scan" and not eqn.params["reverse"]


def _scan(eqn, xs: list[np.ndarray], rules: Mapping[str, Callable]) -> list[np.ndarray]:
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    # Variables with an additional axis outside of the body are the inputs and outputs of each iteration. The others are
    # constants, then the carry. (JAX 0.10 and 0.11 have different names for these numbers.)
    is_input = [len(x.aval.shape) > len(inner.aval.shape) for x, inner in zip(eqn.invars, body.jaxpr.invars)]
    num_carry = sum(len(x.aval.shape) == len(inner.aval.shape) for x, inner in zip(eqn.outvars, body.jaxpr.outvars))
    others = [x for x, of_iteration in zip(xs, is_input) if not of_iteration]
    inputs = [x for x, of_iteration in zip(xs, is_input) if of_iteration]
    consts, carry = others[: len(others) - num_carry], others[len(others) - num_carry :]
    outputs = []
    for k in range(length):
        args = [*consts, *carry, *(as_array(x[k]) for x in inputs)]
        outs = _evaluate(body.jaxpr, list(map(as_scalars, body.consts)), args, rules)
        carry = outs[:num_carry]
        outputs.append(outs[num_carry:])
    return [*carry, *(np.stack(output) for output in zip(*outputs))]


def as_array(x) -> np.ndarray:
    """The result of indexing an object array, as an object array."""
    return x if isinstance(x, np.ndarray) else object_array([x]).reshape(())


def _live(jaxpr) -> list:
    """The equations on which the result depends."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex.core.Literal)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if any(v in needed for v in eqn.outvars):
            live.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, jex.core.Literal))
    return live[::-1]


def _cost(jaxpr) -> float:
    """The number of scalar operations; infinite if the program cannot be written in scalars."""
    total = 0.0
    for eqn in _live(jaxpr):
        name = eqn.primitive.name
        size = sum(math.prod(v.aval.shape) for v in eqn.outvars)
        if any(math.prod(getattr(v.aval, "shape", ())) == 0 for v in (*eqn.invars, *eqn.outvars)):
            return math.inf
        if name in _CALLS:
            total += _cost(_inner(eqn).jaxpr)
        elif _is_short(eqn):
            total += eqn.params["length"] * _cost(eqn.params["jaxpr"].jaxpr)
        elif name in _ELEMENTWISE:
            total += size
        elif name == "dot_general":
            if len({v.aval.dtype for v in (*eqn.invars, *eqn.outvars)}) > 1:
                return math.inf
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * size * math.prod(eqn.invars[0].aval.shape[k] for k in contracted)
        elif name.startswith("reduce_") and name in _STRUCTURAL:
            total += math.prod(eqn.invars[0].aval.shape)
        elif name not in _STRUCTURAL:
            return math.inf
    return total


def _operations(jaxpr) -> Iterator[str]:
    for eqn in _live(jaxpr):
        name = eqn.primitive.name
        if name in _CALLS:
            yield from _operations(_inner(eqn).jaxpr)
        elif _is_short(eqn):
            yield name
            yield from _operations(eqn.params["jaxpr"].jaxpr)
        elif name in _ELEMENTWISE:
            converted = eqn.outvars if name == "convert_element_type" else []
            kinds = {getattr(v.aval.dtype, "kind", "V") for v in (*eqn.invars, *converted)} - {"f"}
            yield f"{name}[{''.join(sorted(kinds))}]" if kinds else name


def as_scalars(x) -> np.ndarray:
    """An array as a NumPy array of scalars."""
    # Known values become constants of the program.
    x = x if isinstance(x, Tracer) else np.asarray(x)
    out = np.empty(np.shape(x), dtype=object)
    for index in np.ndindex(*out.shape):
        out[index] = x[index]
    return out


def object_array(scalars) -> np.ndarray:
    """A sequence of scalars as a NumPy array of objects."""
    out = np.empty(len(scalars), dtype=object)
    for k, scalar in enumerate(scalars):
        out[k] = scalar
    return out


def _evaluate(
    jaxpr, consts: list[np.ndarray], args: list[np.ndarray], rules: Mapping[str, Callable]
) -> list[np.ndarray]:
    env = dict(zip(jaxpr.constvars, consts))
    env.update(zip(jaxpr.invars, args))

    def read(atom):
        if isinstance(atom, jex.core.Literal):
            return as_scalars(np.asarray(atom.val, atom.aval.dtype))  # pyright: ignore[reportAttributeAccessIssue]
        return env[atom]

    for eqn in _live(jaxpr):
        name, xs = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if name in _CALLS:
            inner = _inner(eqn)
            outs = _evaluate(inner.jaxpr, list(map(as_scalars, inner.consts)), xs, rules)
        elif name in _ELEMENTWISE:
            shape = eqn.outvars[0].aval.shape
            xs = [np.broadcast_to(x, shape) for x in xs]
            rule = functools.partial(rules.get(name, eqn.primitive.bind), **eqn.params)
            out = np.empty(shape, dtype=object)
            for index in np.ndindex(*shape):
                out[index] = rule(*(x[index] for x in xs))
            outs = [out]
        elif _is_short(eqn):
            outs = _scan(eqn, xs, rules)
        else:
            outs = _STRUCTURAL[name](eqn, *xs)
            outs = outs if isinstance(outs, list) else [outs]
        env.update(zip(eqn.outvars, outs))
    return [read(atom) for atom in jaxpr.outvars]


class ScalarFunction(NamedTuple):
    """A function of pytrees of arrays, applied to NumPy arrays of scalars. `structure` is its result as
    `jax.ShapeDtypeStruct`s; `cost` is the number of its scalar operations."""

    closed: jex.core.ClosedJaxpr
    structure: PyTree
    cost: float

    @property
    def operations(self) -> frozenset[str]:
        """The names of its elementwise primitives and loops. Brackets give the kinds of arguments other than floating-point
        numbers: `lt[i]` for integers, `select_n[bi]` for booleans and integers."""
        return frozenset(_operations(self.closed.jaxpr))

    def __call__(self, *args, consts: list[np.ndarray] | None = None, rules: Mapping[str, Callable] = {}) -> PyTree:
        """Evaluates the function in scalars, on pytrees of object arrays. `consts` replaces `closed.consts`. `rules` are
        operations on scalars that replace primitives, by the name of the primitive."""
        consts = list(map(as_scalars, self.closed.consts)) if consts is None else consts
        # Constants are NumPy scalars, for which NumPy warns where JAX does not.
        with np.errstate(all="ignore"):
            outs = _evaluate(self.closed.jaxpr, consts, jtu.tree_leaves(args), rules)
        return jtu.tree_unflatten(jtu.tree_structure(self.structure), outs)


def scalarise(fn: Callable, *args, max_cost: float) -> ScalarFunction | None:
    """Rewrites `fn`, a function of `args` (or their `jax.ShapeDtypeStruct`s), in scalars. The result must not be
    differentiated. `None` if `fn` has more than `max_cost` scalar operations, or one that cannot be written in scalars (a
    loop of unknown length, a gather, ...)."""
    closed, structure = jax.make_jaxpr(fn, return_shape=True)(*args)
    cost = _cost(closed.jaxpr)
    return ScalarFunction(closed, structure, cost) if cost <= max_cost else None
