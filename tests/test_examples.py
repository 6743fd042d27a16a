"""The programs of `examples/` with cases compute what they compute with Diffrax's own `diffeqsolve`."""

import pytest

from benchmarks import packages
from benchmarks.examples import EXAMPLES, FOLDER, load

from .problems import only_full


# Diffrax's adjoints and the examples' tables of numbers promote dtypes as users' programs do.
pytestmark = pytest.mark.usefixtures("as_users_run_them")


@pytest.fixture
def as_users_run_them():
    import jax

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def test_every_example_that_compares_is_measured():
    comparing = {path.stem for path in FOLDER.glob("*.py") if "from timing import" in path.read_text()}
    # Those that need packages of their own are tested by `make integration`.
    assert comparing == {*EXAMPLES, *packages.EXAMPLES}


@pytest.mark.parametrize("name", ["double_pendulum", *only_full(*(x for x in EXAMPLES if x != "double_pendulum"))])
def test_an_example_gives_the_numbers_of_diffrax(name):
    timing = load("timing")
    for case in load(name).CASES.values():
        assert timing.compare(case, repeats=1).difference <= case.tolerance
