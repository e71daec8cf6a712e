"""The launcher's variables as one value."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osum_npu import launch
from osum_npu.launch import World, is_scheduler, prepare, read

ROOT = Path(__file__).parents[1]
ADDRESS = {"MASTER_ADDR": "node-0", "MASTER_PORT": "29501"}

WORKER = {
    "RANK_ID": "9",
    "RANK_SIZE": "24",
    "DEVICE_ID": "1",
    "MS_NODE_ID": "9",
    "MS_ROLE": "MS_WORKER",
    "MS_WORKER_NUM": "24",
    "MS_SCHED_HOST": "10.0.0.1",
    "MS_SCHED_PORT": "8118",
    "MS_TOPO_TIMEOUT": "600",
    "HCCL_CONNECT_TIMEOUT": "600",
    "OMP_NUM_THREADS": "1",
}
"""What msrun of MindSpore 2.10.0 gives the second worker of the second node of three."""


def test_a_process_on_its_own():
    assert read({}) == World(rank=0, local_rank=0, world_size=1)
    assert read(ADDRESS) == World()  # a cluster may set these for every job


@given(st.integers(2, 10_000), st.data())
def test_torchrun(world_size, data):
    rank = data.draw(st.integers(0, world_size - 1))
    local_rank = data.draw(st.integers(0, rank))
    variables = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world_size), **ADDRESS}
    want = World(rank=rank, local_rank=local_rank, world_size=world_size, master_addr="node-0", master_port=29501)
    assert read(variables) == want


def test_a_world_of_one_needs_no_address():
    assert read({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}) == World()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": None}, "incomplete: WORLD_SIZE missing beside RANK=1 LOCAL_RANK=1"),
        ({"RANK": None, "WORLD_SIZE": None}, "RANK, WORLD_SIZE missing beside LOCAL_RANK=1"),
        ({"RANK": "4"}, "RANK=4 LOCAL_RANK=1 WORLD_SIZE=4; wanted"),
        ({"LOCAL_RANK": "2"}, "contradict"),
        ({"LOCAL_RANK": "-1"}, "contradict"),
        ({"RANK": "one"}, "RANK='one' is no integer"),
        ({"MASTER_ADDR": None}, "needs MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_PORT": ""}, "needs MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        ({"MASTER_PORT": "99999"}, "no port"),
    ],
)
def test_contradictions_are_named(change, words):
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **ADDRESS, **change}
    with pytest.raises(ValueError, match=re.escape(words)):
        read({name: text for name, text in variables.items() if text is not None})


def test_msrun():
    world = World(rank=9, local_rank=1, world_size=24, master_addr="10.0.0.1", master_port=8118)
    assert read(WORKER) == world
    environ = dict(WORKER)
    prepare(environ)
    assert read(environ) == world
    assert {name: environ[name] for name in launch.MSRUN_NAMES} == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "24",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "8118",
    }
    assert read({name: environ[name] for name in launch.MSRUN_NAMES}) == world


def test_a_world_of_one_under_msrun():
    environ = {**WORKER, "RANK_ID": "0", "MS_NODE_ID": "0", "DEVICE_ID": "0", "RANK_SIZE": "1"}
    prepare(environ)
    assert read(environ) == World()


def test_only_the_role_tells_msrun():
    """Schedulers leave RANK_ID and the like in the environment, too."""
    environ = {name: text for name, text in WORKER.items() if name != "MS_ROLE"}
    prepare(environ)
    assert environ.items() <= WORKER.items()
    assert read(environ) == World()


def test_torchrun_stays_as_it_is():
    environ = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **ADDRESS}
    before = dict(environ)
    prepare(environ)
    assert environ == before


@pytest.mark.parametrize(
    ("threads", "cores", "want"), [("1", 192, "8"), ("1", 2, "1"), ("5", 192, "5"), (None, 192, None)]
)
def test_the_single_thread_of_msrun_becomes_a_share_of_the_cores(threads, cores, want, monkeypatch):
    monkeypatch.setattr(launch, "_cores", lambda: cores)
    environ = {name: text for name, text in {**WORKER, "OMP_NUM_THREADS": threads}.items() if text is not None}
    prepare(environ)
    assert environ.get("OMP_NUM_THREADS") == want


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"MS_NODE_ID": None}, "pass --node_rank to msrun on every node"),
        ({"MS_NODE_ID": None, "RANK_ID": "0"}, "pass --node_rank to msrun on every node"),
        ({"RANK_SIZE": None, "DEVICE_ID": None}, "DEVICE_ID, RANK_SIZE missing beside MS_ROLE=MS_WORKER"),
        ({"RANK_SIZE": "9"}, "contradict"),
        ({"RANK_SIZE": "0"}, "contradict"),
        ({"MS_SCHED_PORT": "none"}, "MASTER_PORT='none' is no integer"),
    ],
)
def test_what_msrun_lacks_is_named(change, words):
    environ = {name: text for name, text in {**WORKER, **change}.items() if text is not None}
    for reader in (read, prepare):
        with pytest.raises(ValueError, match=re.escape(words)):
            reader(environ)


def copy_of_msrun(**variables):
    """Run the command line as a copy of msrun would be run, and say what it imported."""
    code = "import sys; from osum_npu.cli.main import main; status = main(['train', 'gone.yaml']); "
    code += "print(status, [name for name in ('torch', 'pydantic') if name in sys.modules])"
    environ = {name: text for name, text in os.environ.items() if name not in WORKER}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**environ, **variables})


def test_the_scheduler_copy_ends_at_once():
    """Before it reads a word of its command line or imports anything heavy; with another status msrun fails."""
    scheduler = {"MS_ROLE": "MS_SCHED", "RANK_ID": "0", "RANK_SIZE": "2"}
    assert is_scheduler(scheduler)
    assert not is_scheduler(WORKER)
    assert not is_scheduler({})
    done = copy_of_msrun(**scheduler)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_a_copy_without_node_rank_refuses_before_it_computes():
    done = copy_of_msrun(MS_ROLE="MS_WORKER", RANK_ID="0", RANK_SIZE="2", DEVICE_ID="0")
    assert done.stdout.splitlines()[-1] == "2 []"
    assert "pass --node_rank to msrun on every node" in done.stderr


def test_nothing_else_reads_the_variables():
    names = re.compile(
        r"""["'](RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_\w+|MS_\w+|RANK_ID|RANK_SIZE|DEVICE_ID)["']"""
    )
    files = [path for room in ("osum_npu", "backends", "ops") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 10
    readers = [path.name for path in files if names.search(path.read_text("utf-8"))]
    assert readers == ["launch.py"]
