"""Rewrites a function of small arrays as a function of scalars, so that many sequential steps can be one kernel.

On a GPU, a sequential step costs as much as the launches of its kernels. XLA does not fuse through the slices and
concatenations in vector fields (`jnp.stack([y[1], -y[0]])`), since that would repeat work. A Runge-Kutta step of a
two-dimensional field is therefore three or more kernels. In scalars, XLA compiles eight such steps into one kernel (1.4 us a
step instead of 5.6 us on an H200: FitzHugh-Nagumo, Tsit5, float64), and a whole loop can be one kernel (`_loop.py`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.extend as jex
import jax.lax as lax
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jax.extend.core import primitives
from jaxtyping import PyTree


# Applied to each entry: none of their parameters depends on a shape.
_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy cos cosh div eq
    erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le le_to lgamma digamma log log1p logistic lt lt_to max
    min mul ne neg nextafter not or pow real imag rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan
    tanh xor""".split()
)
_CALLS: dict[str, str] = dict.fromkeys(("pjit", "jit", "remat2", "checkpoint"), "jaxpr")
_CALLS |= dict.fromkeys(("closed_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr")
_CALLS["custom_linear_solve"] = "jaxprs"
# JAX 0.12's primitives that are made of others, such as the search of a table.
_CALLS["call_hi_primitive"] = "_prim"


def _inner(eqn) -> jex.core.ClosedJaxpr:
    inner = eqn.params[_CALLS[eqn.primitive.name]]
    if eqn.primitive.name == "custom_linear_solve":
        return inner.solve
    if eqn.primitive.name == "call_hi_primitive":
        return jax.make_jaxpr(inner.expand)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars))
    return inner if isinstance(inner, jex.core.ClosedJaxpr) else jex.core.ClosedJaxpr(inner, ())


def _given(eqn, values: list) -> list:
    """Of the values of an equation's arguments, those of the program that it calls."""
    if eqn.primitive.name != "custom_linear_solve":
        return values
    numbers = eqn.params["const_lengths"]
    before = numbers.matvec + numbers.vecmat
    return [*values[before : before + numbers.solve], *values[before + numbers.solve + numbers.transpose_solve :]]


# Applies a primitive to scalars: `apply(primitive, params, *scalars)`. In a kernel it also has a loop of unknown length,
# `apply.while_loop(condition, body, scalars, dtypes)`. XLA has none in scalars that pays.
Apply: TypeAlias = Any


def in_xla(primitive, params: Mapping, *scalars):
    """Applies a primitive to scalars in JAX."""
    return primitive.bind(*scalars, **params)


def _combine_along(primitive, eqn, apply: Apply, x: np.ndarray) -> np.ndarray:
    axes = eqn.params["axes"]
    kept = [k for k in range(x.ndim) if k not in axes]
    out = np.empty([x.shape[k] for k in kept], dtype=object)
    moved = np.transpose(x, [*kept, *axes]).reshape(*out.shape, -1)
    for index in np.ndindex(*out.shape):
        total, *rest = moved[index]
        for term in rest:
            total = apply(primitive, {}, total, term)
        out[index] = total
    return out


def _extremum_at(beyond, eqn, apply: Apply, x: np.ndarray) -> np.ndarray:
    """Where the first extremum along an axis is, or the first NaN. `beyond`: the comparison of a new extremum."""
    (axis,), dtype = eqn.params["axes"], np.dtype(eqn.params["index_dtype"])
    moved = np.moveaxis(x, axis, -1)
    out = np.empty(moved.shape[:-1], dtype=object)
    for index in np.ndindex(*out.shape):
        best, place = moved[index][0], dtype.type(0)
        for k, value in enumerate(moved[index][1:], start=1):
            unknown = apply(primitives.and_p, {}, apply(primitives.ne_p, {}, value, value), _same(apply, best))
            better = apply(primitives.or_p, {}, apply(beyond, {}, value, best), unknown)
            best = apply(primitives.select_n_p, {}, better, best, value)
            place = apply(primitives.select_n_p, {}, better, place, dtype.type(k))
        out[index] = place
    return out


def _same(apply: Apply, x):
    """Whether a scalar is not NaN."""
    return apply(primitives.eq_p, {}, x, x)


def _dot_general(eqn, apply: Apply, x, y):
    (cx, cy), (bx, by) = eqn.params["dimension_numbers"]
    x = np.transpose(x, [*bx, *(k for k in range(x.ndim) if k not in (*bx, *cx)), *cx])
    y = np.transpose(y, [*by, *(k for k in range(y.ndim) if k not in (*by, *cy)), *cy])
    batch, contracted = x.shape[: len(bx)], math.prod(x.shape[x.ndim - len(cx) :])
    x, y = (z.reshape(*batch, -1, contracted) for z in (x, y))
    out = np.empty((*batch, x.shape[-2], y.shape[-2]), dtype=object)
    for *b, j, k in itertools.product(*map(range, out.shape)):
        total, *rest = (apply(primitives.mul_p, {}, p, q) for p, q in zip(x[(*b, j)], y[(*b, k)]))
        out[(*b, j, k)] = functools.reduce(functools.partial(apply, primitives.add_p, {}), rest, total)
    return out.reshape(eqn.outvars[0].aval.shape)


def _broadcast_in_dim(eqn, x, *_):
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    expanded = [1] * len(shape)
    for axis, dim in enumerate(dims):
        expanded[dim] = x.shape[axis]
    return np.broadcast_to(x.reshape(expanded), shape)


def _barrier(apply: Apply, xs: list[np.ndarray]) -> list[np.ndarray]:
    """The same numbers. In XLA, the operations before and after are compiled apart."""
    if apply is not in_xla:
        return xs
    scalars = iter(lax.optimization_barrier([number for x in xs for number in x.ravel()]))
    return [object_array([next(scalars) for _ in range(x.size)]).reshape(x.shape) for x in xs]


def _slice(eqn, x):
    p = eqn.params
    strides = p["strides"] or (1,) * x.ndim
    return x[tuple(map(slice, p["start_indices"], p["limit_indices"], strides))]


def _split(eqn, x):
    return np.split(x, np.cumsum(eqn.params["sizes"])[:-1], axis=eqn.params["axis"])


def _pad(eqn, x, value):
    shape = eqn.outvars[0].aval.shape
    out = object_array([value.item()] * math.prod(shape)).reshape(shape)
    for index in np.ndindex(*x.shape):
        place = tuple(low + i * (gap + 1) for i, (low, _, gap) in zip(index, eqn.params["padding_config"]))
        if all(0 <= k < n for k, n in zip(place, out.shape)):
            out[place] = x[index]
    return out


def _iota(eqn, *_):
    dtype, shape, axis = (eqn.params[name] for name in ("dtype", "shape", "dimension"))
    along = np.arange(shape[axis], dtype=dtype).reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return as_scalars(np.broadcast_to(along, shape))


# Primitives that move entries.
_STRUCTURAL = {
    "broadcast_in_dim": _broadcast_in_dim,
    "iota": _iota,
    "pad": _pad,
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
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A scalar in memory. `load(number, terms)` reads number `number + sum(stride * index)` of its array, with `terms` the
    pairs of `stride` and `index`, a scalar."""

    load: Callable
    number: int
    dtype: np.dtype

    def value(self):
        """The scalar."""
        return self.load(self.number, [])


def _stored_entry(x: np.ndarray, index):
    """`_entry` as one read of memory; `None` if the entries are not stored at equal distances."""
    items, chosen = x.ravel(), [d for d, i in enumerate(index) if not isinstance(i, (int, np.integer))]
    if not chosen or not all(isinstance(item, Stored) and item.load == items[0].load for item in items):
        return None
    places = np.array([item.number for item in items]).reshape(x.shape)
    places = places[tuple(slice(None) if d in chosen else i for d, i in enumerate(index))]
    first = places[(0,) * places.ndim]
    strides = [np.take(places, 1, axis=d).flat[0] - first if n > 1 else 0 for d, n in enumerate(places.shape)]
    if not np.array_equal(places, first + np.einsum("i,i...->...", strides, np.indices(places.shape))):
        return None
    return items[0].load(int(first), [(int(stride), index[d]) for stride, d in zip(strides, chosen)])


def _entry(x: np.ndarray, index, apply: Apply):
    """`x[index]`, where entries of `index` may be scalars of the program, within the axis."""
    if len(index) == 0:
        return x.item()
    stored = _stored_entry(x, index)
    if stored is not None:
        return stored
    first, *rest = index
    if isinstance(first, (int, np.integer)):
        return _entry(as_array(x[min(max(int(first), 0), len(x) - 1)]), rest, apply)
    entries = [_entry(as_array(row), rest, apply) for row in x]
    value, others = entries[0], entries[1:]
    for k, other in enumerate(others):
        beyond = apply(primitives.gt_p, {}, first, np.asarray(k, first.dtype)[()])
        value = apply(primitives.select_n_p, {}, beyond, value, other)
    return value


def _shifted(start, offset: int, largest: int, apply: Apply):
    """`clip(start, 0, largest) + offset`."""
    if isinstance(start, (int, np.integer)):
        return min(max(int(start), 0), largest) + offset
    low, high, more = (np.asarray(k, start.dtype)[()] for k in (0, largest, offset))
    start = apply(primitives.min_p, {}, apply(primitives.max_p, {}, start, low), high)
    return apply(primitives.add_p, {}, start, more) if offset else start


def _dynamic_slice(eqn, apply: Apply, x, *starts):
    out = np.empty(eqn.outvars[0].aval.shape, dtype=object)
    for index in np.ndindex(*out.shape):
        place = [_shifted(s.item(), i, n - m, apply) for s, i, n, m in zip(starts, index, x.shape, out.shape)]
        out[index] = _entry(x, place, apply)
    return out


def _gather(eqn, apply: Apply, x, starts):
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    collapsed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = dict(zip((d for d in range(x.ndim) if d not in collapsed), numbers.offset_dims))
    out = np.empty(eqn.outvars[0].aval.shape, dtype=object)
    of_batch = [d for d in range(out.ndim) if d not in numbers.offset_dims]
    for index in np.ndindex(*out.shape):
        batch = [index[d] for d in of_batch]
        place = [index[window[d]] if d in window else 0 for d in range(x.ndim)]
        for d, k in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims):
            place[d] = batch[k]
        inside = []
        for d, start in zip(numbers.start_index_map, starts[tuple(batch)]):
            largest = x.shape[d] - sizes[d]
            place[d] = _shifted(start, place[d], largest, apply)
            inside.append(apply(primitives.ge_p, {}, start, np.asarray(0, start.dtype)[()]))
            inside.append(apply(primitives.le_p, {}, start, np.asarray(largest, start.dtype)[()]))
        out[index] = _entry(x, place, apply)
        if _fills(eqn) and inside:
            inside = functools.reduce(functools.partial(apply, primitives.and_p, {}), inside)
            out[index] = apply(primitives.select_n_p, {}, inside, _filling(eqn), out[index])
    return out


def _scatter(eqn, apply: Apply, x, starts, update):
    numbers, out = eqn.params["dimension_numbers"], np.array(x)
    kept = [d for d in range(x.ndim) if d not in numbers.inserted_window_dims]
    for index in np.ndindex(*x.shape):
        hits, missed = [], False
        for d, start in zip(numbers.scatter_dims_to_operand_dims, starts):
            if isinstance(start, (int, np.integer)):
                missed |= bool(start != index[d])
            else:
                hits.append(apply(primitives.eq_p, {}, start, np.asarray(index[d], start.dtype)[()]))
        if missed:
            continue
        new = update[tuple(index[d] for d in kept)]
        if hits:
            hit = functools.reduce(functools.partial(apply, primitives.and_p, {}), hits)
            new = apply(primitives.select_n_p, {}, hit, x[index], new)
        out[index] = new
    return out


def _writes_one_place(eqn) -> bool:
    """Whether a scatter replaces the entries at one index, along all axes that are indexed: `x.at[i].set(y)`."""
    numbers, modes = eqn.params["dimension_numbers"], jax.lax.GatherScatterMode
    whole = set(numbers.scatter_dims_to_operand_dims) == set(numbers.inserted_window_dims)
    one = len(eqn.invars[1].aval.shape) == 1 and not numbers.operand_batching_dims
    return whole and one and eqn.params["mode"] in (modes.FILL_OR_DROP, modes.PROMISE_IN_BOUNDS)


def _fills(eqn) -> bool:
    """Whether a gather fills entries from outside of its operand. Otherwise indices are clipped."""
    return eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP


def _filling(eqn):
    dtype, value = eqn.outvars[0].aval.dtype, eqn.params["fill_value"]
    if value is None:
        value = True if dtype.kind == "b" else np.nan if dtype.kind in "fc" else np.iinfo(dtype).min
    return np.asarray(value, dtype)[()]


def _cond(eqn, apply: Apply, which, *xs):
    """Evaluates all branches and selects one."""
    which, branches = which.item(), [_evaluate_closed(branch, xs, apply) for branch in eqn.params["branches"]]
    outs = [np.empty(v.aval.shape, dtype=object) for v in eqn.outvars]
    for k, results in enumerate(branches):
        chosen = None if k == 0 else apply(primitives.eq_p, {}, which, np.asarray(k, which.dtype)[()])
        for out, new in zip(outs, results):
            for index in np.ndindex(*out.shape):
                old = out[index]
                out[index] = new[index] if k == 0 else apply(primitives.select_n_p, {}, chosen, old, new[index])
    return outs


_BARRIER = "optimization_barrier"

# Primitives that combine entries.
_COMBINING: dict[str, Callable] = {
    "argmax": functools.partial(_extremum_at, primitives.gt_p),
    "argmin": functools.partial(_extremum_at, primitives.lt_p),
    "cond": _cond,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "scatter": _scatter,
    "reduce_sum": functools.partial(_combine_along, primitives.add_p),
    "reduce_prod": functools.partial(_combine_along, primitives.mul_p),
    "reduce_and": functools.partial(_combine_along, primitives.and_p),
    "reduce_or": functools.partial(_combine_along, primitives.or_p),
    "reduce_max": functools.partial(_combine_along, primitives.max_p),
    "reduce_min": functools.partial(_combine_along, primitives.min_p),
}
# The elementwise primitives that they use, by kinds as in `ScalarFunction.operations`.
_USED = {
    "argmax": ("gt", "ne", "eq", "and[b]", "or[b]", "select_n[b]", "select_n[bi]"),
    "argmin": ("lt", "ne", "eq", "and[b]", "or[b]", "select_n[b]", "select_n[bi]"),
    "cond": ("eq[i]", "select_n[b]", "select_n[bi]"),
    "dynamic_slice": ("max[i]", "min[i]", "add[i]", "gt[i]", "select_n[b]"),
    "scatter": ("eq[i]", "and[b]", "select_n[b]", "select_n[bi]"),
    "gather": ("max[i]", "min[i]", "add[i]", "gt[i]", "ge[i]", "le[i]", "and[b]", "select_n[b]", "select_n[bi]"),
}


def _is_short(eqn) -> bool:
    """Whether the equation is a loop of known length, which can be unrolled."""
    return eqn.primitive.name == "scan"


def _is_input(x, inner) -> bool:
    """Whether a loop reads one entry of a variable per iteration, or writes it. `inner` is the variable of its body."""
    return len(x.aval.shape) > len(inner.aval.shape)


def _num_carry(eqn) -> int:
    return sum(not _is_input(x, inner) for x, inner in zip(eqn.outvars, eqn.params["jaxpr"].jaxpr.outvars))


def _scan(eqn, apply: Apply, *xs: np.ndarray) -> list[np.ndarray]:
    body, length, backward = (eqn.params[name] for name in ("jaxpr", "length", "reverse"))
    # Variables with an additional axis outside of the body are the inputs and outputs of each iteration. The others are
    # constants, then the carry. (JAX 0.10 and 0.11 have different names for these numbers.)
    is_input, num_carry = list(map(_is_input, eqn.invars, body.jaxpr.invars)), _num_carry(eqn)
    others = [x for x, of_iteration in zip(xs, is_input) if not of_iteration]
    inputs = [x for x, of_iteration in zip(xs, is_input) if of_iteration]
    consts, carry = others[: len(others) - num_carry], others[len(others) - num_carry :]
    outputs = []
    for k in reversed(range(length)) if backward else range(length):
        outs = _evaluate_closed(body, [*consts, *carry, *(as_array(x[k]) for x in inputs)], apply)
        carry = outs[:num_carry]
        outputs.append(outs[num_carry:])
    outputs = outputs[::-1] if backward else outputs
    return [*carry, *(np.stack(output) for output in zip(*outputs))]


def _while(eqn, apply: Apply, *xs: np.ndarray) -> list[np.ndarray]:
    condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    first, last = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    likes = [v.aval for v in eqn.outvars]

    def arrays(scalars) -> list[np.ndarray]:
        ends = np.cumsum([math.prod(like.shape) for like in likes])[:-1]
        return [x.reshape(like.shape) for x, like in zip(np.split(object_array(scalars), ends), likes)]

    flat = lambda carry: [scalar for x in carry for scalar in x.ravel()]
    dtypes = [like.dtype for like in likes for _ in range(math.prod(like.shape))]
    scalars = apply.while_loop(
        lambda scalars: _evaluate_closed(condition, [*xs[:first], *arrays(scalars)], apply)[0].item(),
        lambda scalars: flat(_evaluate_closed(body, [*xs[first:last], *arrays(scalars)], apply)),
        flat(xs[last:]),
        dtypes,
    )
    return arrays(scalars)


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


_LOOP_PARTS = ("cond_jaxpr", "body_jaxpr")
# Scalar operations of an entry that is read from memory.
_READ_COST = 5


def _cost(jaxpr, origin: Mapping, looked_up: set) -> np.ndarray:
    """The number of scalar operations in a kernel and in XLA; infinite if the program cannot be written in scalars.

    `origin` maps variables that are constants to their positions in `closed.consts`. A kernel reads single entries of
    a constant from memory, where XLA selects among all. The positions of such constants are added to `looked_up`.
    """
    total, origin = np.zeros(2), dict(origin)
    for eqn in _live(jaxpr):
        name = eqn.primitive.name
        size = sum(math.prod(v.aval.shape) for v in eqn.outvars)
        empty = any(math.prod(getattr(v.aval, "shape", ())) == 0 for v in (*eqn.invars, *eqn.outvars))
        # A roll of one entry joins it with none.
        if empty and name not in _STRUCTURAL and name not in _ELEMENTWISE and name not in _CALLS:
            return np.full(2, math.inf)
        known = [None if isinstance(v, jex.core.Literal) else origin.get(v) for v in eqn.invars]

        inside = lambda jaxpr, known=known: _cost(
            jaxpr, {v: k for v, k in zip(jaxpr.invars, known) if k is not None}, looked_up
        )
        if name in _CALLS:
            try:
                total += inside(_inner(eqn).jaxpr, _given(eqn, known))
            except Exception:  # of any kind: a call whose form this release of JAX has changed
                return np.full(2, math.inf)
        elif _is_short(eqn):
            body = eqn.params["jaxpr"].jaxpr
            # A carry is a constant in the first iteration only, and an input is one entry.
            num_consts = len(body.invars) - sum(map(_is_input, eqn.invars, body.invars)) - _num_carry(eqn)
            total += eqn.params["length"] * inside(body, known[:num_consts])
        elif name == "while":
            # The number of iterations is not known. What counts is the size of the kernel.
            total += sum(inside(eqn.params[part].jaxpr, ()) for part in _LOOP_PARTS)
            total += size, math.inf
        elif name in _ELEMENTWISE:
            total += size
        elif name == "dot_general":
            if len({v.aval.dtype for v in (*eqn.invars, *eqn.outvars)}) > 1:
                return np.full(2, math.inf)
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * size * math.prod(eqn.invars[0].aval.shape[k] for k in contracted)
        elif name == "cond":
            total += sum(inside(branch.jaxpr, known[1:]) + size for branch in eqn.params["branches"])
        elif name in ("gather", "dynamic_slice"):
            selections = size * (2 * math.prod(eqn.invars[0].aval.shape) + 8)
            total += selections if known[0] is None else (size * _READ_COST, selections)
            looked_up.update({known[0]} - {None})
        elif name in ("argmax", "argmin"):
            total += 7 * math.prod(eqn.invars[0].aval.shape)
        elif name == "scatter":
            total += 3 * size if _writes_one_place(eqn) else math.inf
        elif name in _COMBINING:
            total += math.prod(eqn.invars[0].aval.shape)
        elif name == _BARRIER:
            pass
        elif name not in _STRUCTURAL:
            return np.full(2, math.inf)
        elif len(known) == len(eqn.outvars) == 1 and known[0] is not None:
            origin[eqn.outvars[0]] = known[0]
    return total


def _operations(jaxpr) -> Iterator[str]:
    for eqn in _live(jaxpr):
        name = eqn.primitive.name
        if name in _CALLS:
            yield from _operations(_inner(eqn).jaxpr)
        elif _is_short(eqn):
            yield from _operations(eqn.params["jaxpr"].jaxpr)
        for inner in (*eqn.params.get("branches", ()), *(eqn.params[k] for k in _LOOP_PARTS if name == "while")):
            yield from _operations(inner.jaxpr)
        yield from _USED.get(name, ())
        if name == "while":
            yield name
        if name in _ELEMENTWISE:
            converted = eqn.outvars if name == "convert_element_type" else []
            kinds = {getattr(v.aval.dtype, "kind", "V") for v in (*eqn.invars, *converted)} - {"f"}
            yield f"{name}[{''.join(sorted(kinds))}]" if kinds else name


def _dtypes(jaxpr) -> Iterator:
    for eqn in _live(jaxpr):
        yield from (v.aval.dtype for v in (*eqn.invars, *eqn.outvars))
        name = eqn.primitive.name
        for inner in (*eqn.params.get("branches", ()), *([_inner(eqn)] if name in _CALLS else [])):
            yield from _dtypes(inner.jaxpr)
        for part in _LOOP_PARTS if name == "while" else ():
            yield from _dtypes(eqn.params[part].jaxpr)
        if _is_short(eqn):
            yield from _dtypes(eqn.params["jaxpr"].jaxpr)


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


def _evaluate_closed(closed: jex.core.ClosedJaxpr, args, apply: Apply) -> list[np.ndarray]:
    return _evaluate(closed.jaxpr, list(map(as_scalars, closed.consts)), args, apply)


def _evaluate(jaxpr, consts: list[np.ndarray], args, apply: Apply) -> list[np.ndarray]:
    env = dict(zip(jaxpr.constvars, consts))
    env.update(zip(jaxpr.invars, args))

    def read(atom):
        if isinstance(atom, jex.core.Literal):
            return as_scalars(np.asarray(atom.val, atom.aval.dtype))  # pyright: ignore[reportAttributeAccessIssue]
        return env[atom]

    for eqn in _live(jaxpr):
        name, xs = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if name in _CALLS:
            outs = _evaluate_closed(_inner(eqn), _given(eqn, xs), apply)
        elif name in _ELEMENTWISE:
            shape = eqn.outvars[0].aval.shape
            xs = [np.broadcast_to(x, shape) for x in xs]
            outs = np.empty(shape, dtype=object)
            for index in np.ndindex(*shape):
                outs[index] = apply(eqn.primitive, eqn.params, *(x[index] for x in xs))
        elif _is_short(eqn):
            outs = _scan(eqn, apply, *xs)
        elif name == "while":
            outs = _while(eqn, apply, *xs)
        elif name == _BARRIER:
            outs = _barrier(apply, xs)
        elif name in _COMBINING:
            outs = _COMBINING[name](eqn, apply, *xs)
        else:
            outs = _STRUCTURAL[name](eqn, *xs)
        env.update(zip(eqn.outvars, outs if isinstance(outs, list) else [outs]))
    return [read(atom) for atom in jaxpr.outvars]


class ScalarFunction(NamedTuple):
    """A function of pytrees of arrays, applied to NumPy arrays of scalars. `closed` is its jaxpr in the leaves of its
    arguments; `structure` is its result as `jax.ShapeDtypeStruct`s; `cost` is the number of its scalar operations in a
    kernel, and `xla_cost` in XLA; `looked_up` has the positions in `closed.consts` of tables that it indexes."""

    closed: jex.core.ClosedJaxpr
    structure: PyTree
    cost: float
    xla_cost: float
    looked_up: frozenset[int]

    def _is_operand(self, k: int) -> bool:
        return isinstance(self.closed.consts[k], Tracer) or k in self.looked_up

    @property
    def operands(self) -> list:
        """The arrays that the function closes over and that are not constants of a program: traced arrays and tables."""
        return [const for k, const in enumerate(self.closed.consts) if self._is_operand(k)]

    def consts(self, operands: list) -> list:
        """`closed.consts`, with these in place of its own `operands`."""
        given = iter(operands)
        return [next(given) if self._is_operand(k) else const for k, const in enumerate(self.closed.consts)]

    @property
    def operations(self) -> frozenset[str]:
        """The names of its elementwise primitives and loops of unknown length. Brackets give the kinds of arguments other
        than floating-point numbers: `lt[i]` for integers, `select_n[bi]` for booleans and integers."""
        return frozenset(_operations(self.closed.jaxpr))

    @property
    def dtypes(self) -> frozenset[np.dtype]:
        """The dtypes of all its values."""
        return frozenset(_dtypes(self.closed.jaxpr)) | {np.dtype(x.dtype) for x in self.closed.consts}

    def __call__(self, *args, consts: list[np.ndarray] | None = None, apply: Apply = in_xla) -> PyTree:
        """Evaluates the function in scalars, on pytrees of object arrays. `consts` replaces `closed.consts`. `apply` applies
        a primitive to scalars."""
        consts = list(map(as_scalars, self.closed.consts)) if consts is None else consts
        # Constants are NumPy scalars, for which NumPy warns where JAX does not.
        with np.errstate(all="ignore"):
            outs = _evaluate(self.closed.jaxpr, consts, jtu.tree_leaves(args), apply)
        return jtu.tree_unflatten(jtu.tree_structure(self.structure), outs)


def largest_array(fn: Callable, *args) -> int:
    """The number of entries of the largest array that the program of `fn` reads or makes, for `args` like these."""

    def largest(jaxpr) -> int:
        found = 1
        for eqn in _live(jaxpr):
            found = max([found, *(math.prod(getattr(v.aval, "shape", ())) for v in (*eqn.invars, *eqn.outvars))])
            inner = [x for value in eqn.params.values() for x in (value if isinstance(value, tuple) else (value,))]
            found = max([found, *(largest(x.jaxpr) for x in inner if isinstance(x, jex.core.ClosedJaxpr))])
        return found

    return largest(jax.make_jaxpr(fn)(*args).jaxpr)


def scalarise(fn: Callable, *args, max_cost: float) -> ScalarFunction | None:
    """Rewrites `fn`, a function of `args` (or their `jax.ShapeDtypeStruct`s), in scalars. The result must not be
    differentiated. All branches of a `cond` are evaluated. A gather is one selection per entry of its operand; in
    a kernel, a read of memory if the operand is a constant.

    `None` if `fn` has more than `max_cost` scalar operations in a kernel, or one that cannot be written in scalars (a sort,
    random numbers, ...). Loops of unknown length can be written in a kernel only."""
    closed, structure = jax.make_jaxpr(fn, return_shape=True)(*args)
    looked_up: set[int] = set()
    cost, xla_cost = _cost(closed.jaxpr, {v: k for k, v in enumerate(closed.jaxpr.constvars)}, looked_up)
    if cost > max_cost:
        return None
    return ScalarFunction(closed, structure, float(cost), float(xla_cost), frozenset(looked_up))
