"""Checks of arguments. Their messages have one form: the call as written, the value received, what was expected."""

from typing import Any


def check_integer(call: str, name: str, value: Any, meaning: str, least: int = 1, optional: bool = False):
    """Raises unless `value` is a Python integer of at least `least`, or `None` if `optional`.

    **Arguments:**

    - `call`: the function or class, as the user writes it.
    - `name`, `value`: the argument.
    - `meaning`: the argument in words, for the message.
    - `least`: the smallest value allowed.
    - `optional`: whether `None` is allowed.

    **Raises:** `TypeError` if `value` is not an integer; `ValueError` if it is too small.
    """
    if optional and value is None:
        return
    expected = f"expected an integer of at least {least}" + (", or `None` for the default" if optional else "")
    message = f"`{call}({name}={value!r})`: {meaning}; {expected}."
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message)
    if value < least:
        raise ValueError(message)


def check_instance(call: str, name: str, value: Any, kind: type, example: str):
    """Raises `TypeError` unless `value` is an instance of `kind`. `example` is an instance as the user writes it."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{call}({name}={value!r})`: expected an instance of `{kind.__name__}`, for example `{example}`."
        )
