"""What ranks find out by comparing notes: a slow one, and weights that differ by a bit."""

import os
import subprocess
import sys

import launching
import pytest
import tiny
import torch
from torch import nn

from osum_npu.training.agreement import check_equal, digests, straggler
from osum_npu.training.log import read_log

HOSTS = ["a", "b", "c", "d"]


def notes(*seconds):
    return [{"waited": s / 4, "computed": 3 * s / 4, "steps": 10} for s in seconds]


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [((1, 1, 1.4, 1), None), ((1, 1, 1.6, 1), 2), ((1, 1.6), 1), ((1,), None), ((1, 1, 5, 9), 3), ((9, 9, 9, 1), None)],
)
def test_a_rank_is_slow_by_half_more_than_the_median(seconds, slow):
    assert straggler(notes(*seconds)) == slow


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 40), nn.Linear(40, 4).to(torch.bfloat16), *[nn.LayerNorm(3) for _ in range(8)])


@pytest.mark.parametrize(("name", "place"), [("0.weight", 11999), ("1.weight", 7), ("9.bias", 0)])
def test_a_single_bit_is_found_in_time(name, place):
    one, other = model(), model()
    bits = dict(other.named_parameters())[name].data.view(-1)
    bits.view(torch.int16 if bits.dtype == torch.bfloat16 else torch.int32)[place] ^= 1
    turns = [turn for turn in range(60) if digests(one, turn) != digests(other, turn)]
    assert turns
    assert {
        key for turn in turns for key, value in digests(one, turn).items() if value != digests(other, turn)[key]
    } == {name}
    assert all(digests(one, turn) == digests(model(), turn) for turn in range(60))


def test_the_odd_rank_is_named():
    same = {"x": "1", "y": "2"}
    check_equal([same] * 4, HOSTS, 30, 20)
    with pytest.raises(ValueError, match=r"step 30: .*: y differs on rank 2 \(c\) from the others. After step 20 no"):
        check_equal([same, same, {**same, "y": "3"}, same], HOSTS, 30, 20)


PROGRAM = """\
import sys, time
from osum_npu.config import load_recipe
from osum_npu.data import collate
from osum_npu.training.loop import train
from osum_npu.training.step import Computation

rank, read, original = int(sys.argv[1]), collate.read_audio, Computation.backward
steps = []

def slowly(*words, **more):
    time.sleep(0.03 * rank)
    return read(*words, **more)

def broken(computation, *words):
    steps.append(words)
    if len(steps) == 6 and rank:
        for parameter in computation.model.llm.parameters():
            parameter.data += 1e-3
    return original(computation, *words)

collate.read_audio, Computation.backward = slowly, broken
try:
    train(load_recipe([sys.argv[2]], sys.argv[3:]))
except ValueError as error:
    print(error)
    sys.exit(2)
"""


def test_two_ranks_one_slow_and_then_broken(corpus, tmp_path):
    """Rank 1 reads slowly; from step 6 on its LLM is another. Both end with the same words."""
    recipe, port = tiny.write_recipe(tmp_path / "recipe.yaml", corpus), launching.free_port()
    words = [sys.executable, "-c", PROGRAM]
    more = [recipe, f"out={tmp_path / 'run'}", "log_every=2", "stages.1.steps=40", "checkpoint_every=100"]
    processes = []
    for rank in range(2):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OSUM_BACKEND": "cpu", **{k: str(v) for k, v in world.items()}}
        call = [*words, str(rank), *map(str, more)]
        processes.append(subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    for words in said:
        assert "the ranks no longer have the same weights: llm." in words, words
    assert said[0].count(": rank 1 on ") == 1
    assert "is slow: it waits" in said[0]
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert rows[0]["slow_rank"] == 1
    assert 6 <= int(said[0].split(": the ranks no longer")[0].rpartition("step ")[2]) <= 24
