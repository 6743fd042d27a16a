"""JAX's elementwise primitives, by the operations of a backend.

A backend compiles a program for one thread, or interprets it. It has numbers, each with a `dtype` (float32, float64, int32,
int64, uint32 or bool), and these operations:

- `constant(x)`: a NumPy scalar as a number.
- `arithmetic(name, x, y)`: `add sub mul div rem and or xor` of numbers of one dtype.
- `compare(name, x, y)`: `eq ne lt le gt ge`; false for NaN, except `ne`.
- `select(condition, then, otherwise)`.
- `convert(x, dtype)`: the nearest number of another dtype. Integers from floating-point numbers are in range.
- `function(name, *xs)`: a function of floating-point numbers, named like a primitive.
- `multiply_add(x, y, z)`: `x y + z` of floating-point numbers, rounded once.

`_threads.py` has the rest of it, memory and loops. Everything here is written once for all backends.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ._scalarise import ScalarFunction, Stored


DTYPES = frozenset(map(np.dtype, (np.float32, np.float64, np.int32, np.int64, np.uint32, np.bool_)))

_erf = np.vectorize(math.erf, otypes=[float])

# Floating-point functions in NumPy: what those of a backend must return.
FUNCTIONS: dict[str, Callable] = {
    **{
        name: getattr(np, name)
        for name in "abs cbrt ceil cos cosh exp exp2 expm1 floor log log1p sin sinh sqrt".split()
    },
    **{name: getattr(np, name) for name in ("tan", "tanh")},
    **{f"a{name}": getattr(np, f"arc{name}") for name in ("cos", "cosh", "sin", "sinh", "tan", "tanh")},
    "atan2": np.arctan2,
    "erf": lambda x: _erf(x).astype(x.dtype),
    "neg": np.negative,
    "pow": np.power,
    "round_away": lambda x: np.copysign(np.floor(np.abs(x) + np.asarray(0.5, x.dtype)), x),
    "round_even": np.round,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}
# Their names in JAX's programs, where these differ.
_PRIMITIVES = {"round_away": "round", "round_even": "round"}
# Tested before any kernel runs. The others are tested before the first kernel that uses one of them.
COMMON_FUNCTIONS = frozenset("abs cos exp log neg sin sqrt tanh".split())

_LARGEST_TWICE_POWER = 16


def unsupported(scalar: ScalarFunction) -> list[str]:
    """The operations and dtypes of a function that backends lack."""
    operations = sorted(op for op in scalar.operations if not _is_supported(op))
    return operations + sorted(str(dtype) for dtype in scalar.dtypes if dtype not in DTYPES)


def _is_supported(operation: str) -> bool:
    name, _, kinds = operation.rstrip("]").partition("[")
    return name == "while" or (name in _RULES and set(kinds or "f") <= set(_RULES[name][0]))


def uses_rare_operations(scalar: ScalarFunction) -> bool:
    """Whether a function needs more than `COMMON_FUNCTIONS`, as powers may, or loops within."""
    rare = {"while"} | {_PRIMITIVES.get(name, name) for name in FUNCTIONS.keys() - COMMON_FUNCTIONS}
    return any(operation.partition("[")[0] in rare for operation in scalar.operations)


class InBackend:
    """The `apply` of `ScalarFunction.__call__` that applies primitives to numbers of a backend, and to NumPy scalars."""

    def __init__(self, backend):
        self.backend = backend

    def __call__(self, primitive, params: Mapping, *xs):
        _, rule = _RULES[primitive.name]
        return rule(_Rules(self.backend, params), *(x.value() if isinstance(x, Stored) else x for x in xs))

    def while_loop(self, condition: Callable, body: Callable, scalars: Sequence, dtypes: Sequence[np.dtype]) -> list:
        """`while condition(scalars): scalars = body(scalars)`, for scalars of these dtypes."""

        def numbers(scalars) -> list:
            return [as_number(self.backend, x, dtype) for x, dtype in zip(scalars, dtypes)]

        holds = lambda scalars: as_number(self.backend, condition(scalars), np.dtype(bool))
        return self.backend.while_loop(holds, lambda scalars: numbers(body(scalars)), numbers(scalars))


def as_number(backend, x, dtype):
    """A number, a NumPy scalar or one in memory as a number of another dtype."""
    x = x.value() if isinstance(x, Stored) else x
    x = backend.constant(x) if isinstance(x, np.generic) else x
    if x.dtype == dtype:
        return x
    if np.dtype(dtype).kind == "b":
        return backend.compare("ne", x, backend.constant(x.dtype.type(0)))
    return backend.convert(x, dtype)


class _Rules:
    """A backend, with the parameters of one application of a primitive. NumPy scalars become numbers."""

    def __init__(self, backend, params: Mapping):
        self.backend, self.params = backend, params

    def number(self, x, like=None):
        """`x` as a number, of the dtype of `like` if `x` is a Python number."""
        if like is not None and not hasattr(x, "dtype"):
            x = np.asarray(x, like.dtype)[()]
        return self.backend.constant(x) if isinstance(x, np.generic) else x

    def arithmetic(self, name: str, x, y):
        x, y = self._both(x, y)
        return self.backend.arithmetic(name, x, y)

    def compare(self, name: str, x, y):
        x, y = self._both(x, y)
        return self.backend.compare(name, x, y)

    def select(self, condition, then, otherwise):
        then, otherwise = self._both(then, otherwise)
        return self.backend.select(self.number(condition), then, otherwise)

    def function(self, name: str, *xs):
        return self.backend.function(name, *map(self.number, xs))

    def _both(self, x, y):
        like = x if hasattr(x, "dtype") else y
        return self.number(x, like), self.number(y, like)


def _arithmetic(name: str) -> Callable:
    return lambda ops, x, y: ops.arithmetic(name, x, y)


def _comparison(name: str) -> Callable:
    return lambda ops, x, y: ops.compare(name, x, y)


def _function(name: str) -> Callable:
    return lambda ops, *xs: ops.function(name, *xs)


def _divide(ops, x, y):
    if x.dtype.kind == "f":
        inverse: Any = np.reciprocal(y) if isinstance(y, np.floating) else np.nan
        if np.isfinite(inverse) and abs(inverse) >= np.finfo(x.dtype).tiny:
            # As in XLA. A division takes as long as ten products.
            return ops.arithmetic("mul", x, inverse)
        return ops.arithmetic("div", x, y)
    by_zero, divisor = _divisor(ops, y)
    quotient = ops.arithmetic("div", x, divisor)
    if x.dtype.kind == "i":
        # The smallest integer has no opposite: the product wraps around, as in XLA.
        quotient = ops.select(ops.compare("eq", y, -1), ops.arithmetic("sub", 0, x), quotient)
    return ops.select(by_zero, np.invert(np.zeros((), x.dtype))[()], quotient)


def _remainder(ops, x, y):
    if x.dtype.kind == "f":
        return _float_remainder(ops, x, y)
    by_zero, divisor = _divisor(ops, y)
    return ops.select(by_zero, x, ops.arithmetic("rem", x, divisor))


def _float_remainder(ops, x, y):
    """`x - n y` with the whole number `n = x / y`, rounded toward zero; exact. NaN if `n` is too large for that."""
    a, b = ops.function("abs", x), ops.function("abs", y)
    count = ops.function("floor", ops.arithmetic("div", a, b))
    # `count` may be too large by one. The remainder is a number of this dtype, so one rounding loses nothing.
    rest = ops.backend.multiply_add(ops.function("neg", count), b, a)
    rest = ops.select(ops.compare("lt", rest, 0), ops.arithmetic("add", rest, b), rest)
    rest = ops.select(ops.compare("lt", a, b), a, rest)
    rest = ops.select(ops.compare("lt", count, 0.25 / np.finfo(x.dtype).eps), rest, np.nan)
    return ops.select(ops.compare("lt", x, 0), ops.function("neg", rest), rest)


def _divisor(ops, y):
    """Whether an integer is zero, and a divisor by which division is defined."""
    by_zero = ops.compare("eq", y, 0)
    divisor = ops.select(by_zero, 1, y)
    return by_zero, ops.select(ops.compare("eq", y, -1), 1, divisor) if y.dtype.kind == "i" else divisor


def _negate(ops, x):
    return ops.function("neg", x) if x.dtype.kind == "f" else ops.arithmetic("sub", 0, x)


def _absolute(ops, x):
    if x.dtype.kind == "f":
        return ops.function("abs", x)
    return ops.select(ops.compare("lt", x, 0), ops.arithmetic("sub", 0, x), x)


def _sign(ops, x):
    return ops.select(ops.compare("gt", x, 0), 1, ops.select(ops.compare("lt", x, 0), -1, x))


def _extremum(name: str) -> Callable:
    def rule(ops, x, y):
        if x.dtype.kind == "b":
            return ops.arithmetic("or" if name == "gt" else "and", x, y)
        value = ops.select(ops.compare(name, x, y), x, y)
        # If `y` is NaN, no comparison holds and the value is `y`.
        return ops.select(ops.compare("ne", x, x), x, value) if x.dtype.kind == "f" else value

    return rule


_larger, _smaller = _extremum("gt"), _extremum("lt")


def _clamp(ops, low, x, high):
    return _smaller(ops, _larger(ops, x, low), high)


def _select_n(ops, which, *cases):
    if which.dtype.kind == "b":
        otherwise, *then = cases
        return ops.select(which, then[0], otherwise) if then else otherwise
    value, *others = cases
    for k, other in enumerate(others):
        value = ops.select(ops.compare("gt", which, k), other, value)
    return value


def _convert(ops, x):
    dtype, x = np.dtype(ops.params["new_dtype"]), ops.number(x)
    if dtype == x.dtype:
        return x
    if dtype.kind == "b":
        return ops.compare("ne", x, 0)
    if x.dtype.kind != "f" or dtype.kind == "f":
        return ops.backend.convert(x, dtype)
    # As in XLA, integers saturate, and NaN is zero.
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    low, high = (
        np.asarray(bound, x.dtype)[()] for bound in (float(least), float(most) + 1 if most < 2**53 else 2.0**63)
    )
    below, above = ops.compare("lt", x, low), ops.compare("ge", x, high)
    inside = ops.arithmetic("and", ops.compare("ge", x, low), ops.compare("lt", x, high))
    value = ops.backend.convert(ops.select(inside, x, 0), dtype)
    value = ops.select(below, np.asarray(least, dtype)[()], value)
    return ops.select(above, np.asarray(most, dtype)[()], value)


def _integer_power(ops, x, y: int):
    """`x**y` by repeated products."""
    if y == 0:
        return ops.number(1, x)
    value = x
    # The binary digits after the first.
    for digit in bin(abs(y))[3:]:
        value = ops.arithmetic("mul", value, value)
        value = ops.arithmetic("mul", value, x) if digit == "1" else value
    return ops.arithmetic("div", 1, value) if y < 0 else value


def _power(ops, x, exponent):
    """`x**exponent`, by roots and products if twice the exponent is a known integer."""
    exponent_is_known = isinstance(exponent, np.generic)
    twice = 2 * float(exponent) if exponent_is_known else np.nan
    if not (abs(twice) <= _LARGEST_TWICE_POWER and twice == np.round(twice)):
        exponent = ops.number(exponent)
        exponent = exponent if exponent.dtype == x.dtype else ops.backend.convert(exponent, x.dtype)
        return ops.function("pow", x, exponent)
    whole, half = divmod(int(abs(twice)), 2)
    value = _integer_power(ops, x, whole)
    if half:
        value = ops.arithmetic("mul", value, ops.function("sqrt", x))
    return ops.arithmetic("div", 1, value) if twice < 0 else value


def _logistic(ops, x):
    return ops.arithmetic("div", 1, ops.arithmetic("add", ops.function("exp", ops.function("neg", x)), 1))


def _round(ops, x):
    return ops.function("round_even" if int(ops.params["rounding_method"]) == 1 else "round_away", x)


def _in_total_order(name: str) -> Callable:
    """A comparison in which NaN is larger than every number. JAX asks it of numbers without negative zeros and NaNs."""

    def rule(ops, x, y):
        after = ops.compare("ne", y, y)
        if name == "lt":
            after = ops.arithmetic("and", after, ops.compare("eq", x, x))
        return ops.arithmetic("or", ops.compare(name, x, y), after)

    return rule


# For each primitive: the kinds of its arguments (floating-point, integer, unsigned, boolean), and what it does.
_RULES: dict[str, tuple[str, Callable]] = {
    **{name: ("fiu", _arithmetic(name)) for name in ("add", "sub", "mul")},
    **{name: ("iub", _arithmetic(name)) for name in ("and", "or", "xor")},
    **{name: ("fiub", _comparison(name)) for name in ("eq", "ne")},
    **{name: ("fiu", _comparison(name)) for name in ("lt", "le", "gt", "ge")},
    **{name: ("f", _function(name)) for name in FUNCTIONS.keys() - _PRIMITIVES.keys()},
    "abs": ("fi", _absolute),
    "add_any": ("fiu", _arithmetic("add")),
    "clamp": ("fiu", _clamp),
    "convert_element_type": ("fiub", _convert),
    "copy": ("fiub", lambda ops, x: x),
    "div": ("fiu", _divide),
    "integer_pow": ("fi", lambda ops, x: _integer_power(ops, x, ops.params["y"])),
    "is_finite": ("f", lambda ops, x: ops.compare("lt", ops.function("abs", x), np.inf)),
    "le_to": ("f", _in_total_order("le")),
    "logistic": ("f", _logistic),
    "lt_to": ("f", _in_total_order("lt")),
    "max": ("fiub", _larger),
    "min": ("fiub", _smaller),
    "neg": ("fi", _negate),
    "not": ("b", lambda ops, x: ops.arithmetic("xor", x, np.True_)),
    "pow": ("fi", _power),
    "rem": ("fiu", _remainder),
    "round": ("f", _round),
    "select_n": ("fiub", _select_n),
    "sign": ("fi", _sign),
    "square": ("fi", lambda ops, x: ops.arithmetic("mul", x, x)),
    "stop_gradient": ("fiub", lambda ops, x: x),
}
