"""How long other people's programs take with our solver beside Diffrax's: the examples that need packages of their own.

Runs where they are installed, in Python 3.12 or newer: `pip install '.[examples,packages]'`.
"""

from collections.abc import Iterator

from .examples import measured


# Each example, and the package that it needs.
EXAMPLES = {"galactic_orbits": "galax", "lynx_and_hare": "dynestyx"}


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    yield from measured(EXAMPLES, 3 if quick else 9)
