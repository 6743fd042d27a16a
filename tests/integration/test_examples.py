"""The examples that need packages of their own compute what they compute with Diffrax's solver: values and derivatives."""

import pytest

from benchmarks.examples import load
from benchmarks.packages import EXAMPLES


@pytest.mark.parametrize("name, package", EXAMPLES.items())
def test_an_example_gives_the_numbers_of_the_solver_that_it_wraps(name, package):
    pytest.importorskip(package, reason=f"{package} needs Python 3.12")
    timing, cases = load("timing"), load(name).CASES
    assert len(cases) == 2
    for case in cases.values():
        assert timing.compare(case, repeats=1).difference <= case.tolerance
