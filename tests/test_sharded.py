"""Over several devices: the same result and gradient as of steps in sequence, and nothing as long as time is gathered.

The checks run in processes of their own (`sharded_program.py`), on eight devices that the CPU is made to have.
"""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest
from jax.sharding import Mesh

import parallel_diffrax as pdx


ROOT = pathlib.Path(__file__).parents[1]


def start(*arguments, devices):
    environment = os.environ | {
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        # Beside those of `conftest.py`.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-W", "error", "-m", "tests.sharded_program", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def outcome(process):
    """What a check printed."""
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


@functools.cache
def on_eight_devices():
    """Three checks in one process, since it takes seconds to start; the one that sets what others read comes last."""
    return outcome(start("scans,batch,policy", devices=8))


@pytest.mark.full
def test_scans_of_any_kind_length_and_direction_are_those_of_a_loop():
    got = on_eight_devices()["scans"]
    assert len(got["differences"]) == 15
    # NaN is in no range.
    assert all(0 <= difference <= 1e-14 for difference in got["differences"].values()), got["differences"]
    assert got["finite"] == [True] * 8 + [False] * 5


@pytest.mark.full
def test_a_batch_and_its_gradient_on_two_axes_of_a_mesh_are_those_of_steps_in_sequence():
    got = on_eight_devices()["batch"]
    assert 0 <= got["state"] <= 1e-12
    assert 0 <= got["gradient"] <= 1e-12
    # Four members over two devices; nothing made each of them hold all.
    assert got["shards"] == [[2, 2]]


@pytest.mark.full
def test_the_default_policy_cuts_where_it_must_and_gathers_nothing_as_long_as_time():
    got = on_eight_devices()["policy"]
    assert 0 <= got["difference"] <= 1e-12
    assert got["attempts"] > 2
    kinds = {kind for kind, _ in got["collectives"]}
    assert {"all-gather", "all-reduce", "collective-permute"} <= kinds
    for kind, size in got["collectives"]:
        # Neighbours exchange what lies differently in a longer buffer: less than one device has.
        limit = got["numbers"] // (8 if kind == "collective-permute" else 64)
        assert size <= limit, (kind, size)


def test_two_processes_solve_together_what_one_does():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [start("processes", rank, port, devices=2) for rank in range(2)]
    try:
        for got in (outcome(process)["processes"] for process in both):
            assert (got["devices"], got["own"]) == (4, 2)
            assert 0 <= got["difference"] <= 1e-12
    finally:
        for process in both:
            process.kill()


def test_what_is_no_mesh_or_lacks_the_axis_is_refused_in_words():
    mesh = Mesh(jax.devices()[:1], "time")
    assert pdx.scans.ShardedScan(mesh).num_devices == 1
    with pytest.raises(TypeError, match="mesh"):
        pdx.scans.ShardedScan(jax.devices())  # pyright: ignore
    with pytest.raises(ValueError, match=r"axis='batch'.*has the axes \('time',\)"):
        pdx.scans.ShardedScan(mesh, "batch")
    with pytest.raises(ValueError, match="has the axes"):
        pdx.scans.ShardedScan(mesh, ())
    with pytest.raises(TypeError, match="the scan that one device makes"):
        pdx.scans.ShardedScan(mesh, local=pdx.scans.ShardedScan(mesh))
