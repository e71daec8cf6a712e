"""The launcher's variables as one value."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.launch import World, read

ROOT = Path(__file__).parents[1]
ADDRESS = {"MASTER_ADDR": "node-0", "MASTER_PORT": "29501"}


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


def test_nothing_else_reads_the_variables():
    names = re.compile(r"""["'](RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)["']""")
    files = [path for room in ("osum_npu", "backends", "ops") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 10
    readers = [path.name for path in files if names.search(path.read_text("utf-8"))]
    assert readers == ["launch.py"]
