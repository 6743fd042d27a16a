"""What `ParallelAdjoint` relies on in Diffrax's private loop is as it was when `_ode/_loop_state.py` was written.

If a test here fails, Diffrax has changed it: read `diffrax/_integrate.py` beside that file before changing the lists.
"""

import inspect

import diffrax as dfx
import pytest

import parallel_diffrax as pdx
from parallel_diffrax._ode import _loop_state as contact

from .problems import parallel_solver


def names(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_state_of_the_loop_has_the_fields_that_are_known():
    for cls, fields in contact.FIELDS.items():
        assert sorted(cls.__dataclass_fields__) == sorted(fields), cls


def test_the_loop_and_the_adjoint_are_called_with_the_arguments_that_are_known():
    assert sorted(names(contact.loop)) == sorted(contact.LOOP_ARGUMENTS)
    handed_on = set(contact.LOOP_ARGUMENTS) - {"inner_while_loop", "outer_while_loop"}
    discarded = {"throw", "passed_solver_state", "passed_controller_state"}
    assert set(names(dfx.AbstractAdjoint.loop)) == handed_on | discarded
    assert set(names(dfx.Event.__init__)) == {"cond_fn", "root_finder", "direction"}
    assert discarded < set(names(pdx.ParallelAdjoint.loop))


def test_another_diffrax_is_refused_before_anything_is_solved(monkeypatch):
    monkeypatch.setitem(contact.FIELDS, dfx.SubSaveAt, ("t0", "t1", "ts", "steps", "fn", "new"))
    solver = parallel_solver(dfx.Heun(), 4)
    with pytest.raises(RuntimeError, match=r"ParallelAdjoint\(\).*SubSaveAt.*other adjoint"):
        dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -y), solver, 0.0, 1.0, 1.0, 1.0, adjoint=pdx.ParallelAdjoint(), max_steps=1
        )
