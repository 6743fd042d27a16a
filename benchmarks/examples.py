"""How long the examples take beside plain Diffrax, with only the import changed.

Each example in `examples/` has its cases: programs that are run with our `diffeqsolve` and with Diffrax's. The rows have
ratios of times without compilation, and the largest relative difference of the results. A difference above the tolerance of
the case is an error.
"""

import importlib
import pathlib
import sys
from collections.abc import Iterable, Iterator


FOLDER = pathlib.Path(__file__).parent.parent / "examples"
EXAMPLES = (
    "hodgkin_huxley",
    "pharmacokinetics",
    "robertson",
    "double_pendulum",
    "recorded_neuron",
    "ensemble",
    "langevin",
)


def load(name: str):
    """The module of an example, or the one that they share, `timing`."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


def rows(quick: bool) -> Iterator[dict]:
    """Yields the rows of this part."""
    yield from measured(EXAMPLES[:1] if quick else EXAMPLES, 3 if quick else 9)


def measured(names: Iterable[str], repeats: int) -> Iterator[dict]:
    """A row for each case of these examples."""
    for name in names:
        for what, case in load(name).CASES.items():
            found = load("timing").compare(case, repeats)
            yield {"example": name, "what": what, "ratio": found.ratio, "difference": found.difference}
