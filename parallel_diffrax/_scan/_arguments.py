"""Checks of arguments. Their messages have one form: the call as written, the value received, what was expected."""

from typing import Any


def check_integer(call: str, name: str, value: Any, meaning: str, least: int = 1, optional: bool = False):
    """Raises `TypeError` unless `value` is a Python integer, or `None` if `optional`, and `ValueError` if it is less than
    `least`. `call` is the function or class as the user writes it; `meaning` is the argument in words."""
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
