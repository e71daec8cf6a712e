"""Two ranks with two workers each: an epoch holds every utterance once, also when the run is killed in the middle."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from itertools import pairwise

import pytest
from shard_tools import shard, write_list

from osum_npu.data import plan
from osum_npu.data.collate import Collator
from osum_npu.data.loader import Position, steps
from osum_npu.data.plan import WeightedSource, plan_epoch
from osum_npu.data.sources import read_source
from osum_npu.models.tokenizer import train_tokenizer

TASKS = {"asr": 1.0}
BATCH_SECONDS = 1.2
SEED = 5
RANKS, WORKERS = 2, 2
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six shards with 25 utterances each."""
    folder = tmp_path_factory.mktemp("shards")
    for tar in range(6):
        shard(folder / f"{tar}.tar", [f"{tar}-{i:02d}" for i in range(25)])
    path = write_list(folder / "shards_list.txt", *(f"{tar}.tar" for tar in range(6)))
    utterances, skipped = read_source(path, 30)
    assert skipped == []
    return utterances


@pytest.fixture(scope="module")
def collate():
    return Collator(train_tokenizer(["hello"], [], 300), 80, SEED, None, 30)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that the plan shuffles in several blocks: two tars each."""
    monkeypatch.setattr(plan, "_BLOCK", 50)


def follow(source, collate, rank, start, log, pause):
    """One rank of a run: note what each step reads, and where the run then stands."""
    feed = steps(
        [WeightedSource(source)],
        TASKS,
        collate,
        batch_seconds=BATCH_SECONDS,
        start=start,
        rank=rank,
        world_size=RANKS,
        workers=WORKERS,
    )
    with open(log, "w", encoding="utf-8") as file:
        for step in feed:
            assert not any(batch.skipped for batch in step.batches)
            keys = [example.utterance.key for batch in step.batches for example in batch.examples]
            print(json.dumps([keys, step.after.epoch, step.after.step]), file=file, flush=True)
            if step.after.epoch == 2:
                return
            time.sleep(pause)


def run(source, collate, folder, start=None, kill_after=None):
    """Run all ranks, to the end of the second epoch or until they are killed; return the steps noted by each."""
    folder.mkdir()
    logs = [folder / f"{rank}.jsonl" for rank in range(RANKS)]
    pause = 0.0 if kill_after is None else 0.02
    start = start or Position()
    processes = [
        FORK.Process(target=follow, args=(source, collate, rank, start, log, pause)) for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    if kill_after is not None:
        while not all(log.exists() and log.read_bytes().count(b"\n") >= kill_after for log in logs):
            time.sleep(0.01)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
        assert process.exitcode == (0 if kill_after is None else -signal.SIGKILL)
    return [[json.loads(line) for line in log.read_text("utf-8").splitlines() if line.endswith("]")] for log in logs]


def test_every_utterance_comes_once_an_epoch(source, collate, tmp_path):
    wanted = Counter(utterance.key for utterance in source)
    whole = run(source, collate, tmp_path / "whole")
    assert len(whole[0]) == len(whole[1])
    ends = [number for number, (_, _, step) in enumerate(whole[0], 1) if step == 0]
    assert len(ends) == 2
    for first, last in pairwise([0, *ends]):
        assert Counter(key for steps in whole for keys, *_ in steps[first:last] for key in keys) == wanted
    orders = [[keys for keys, *_ in steps] for steps in whole]
    assert orders[0][: ends[0]] != orders[0][ends[0] :]

    done = len(whole[0]) // 3
    begun = run(source, collate, tmp_path / "begun", kill_after=done)
    shared = min(map(len, begun))  # what both ranks did is what a checkpoint can hold
    assert done <= shared < len(whole[0])
    assert [steps[:shared] for steps in begun] == [steps[:shared] for steps in whole]
    _, epoch, step = begun[0][shared - 1]
    resumed = run(source, collate, tmp_path / "resumed", start=Position(epoch, step))
    assert resumed == [steps[shared:] for steps in whole]


def test_neighbours_in_the_plan_come_from_few_tars(source):
    parts = plan_epoch([WeightedSource(source)], TASKS, batch_seconds=BATCH_SECONDS, seed=SEED, epoch=0)
    rows = [example for step in parts for example in step]
    assert Counter(example.utterance.key for example in rows) == Counter(utterance.key for utterance in source)
    blocks = [{example.utterance.wav.tar for example in rows[start : start + 50]} for start in range(0, 150, 50)]
    assert [len(tars) for tars in blocks] == [2, 2, 2]
    assert len(set().union(*blocks)) == 6
    first = [example.utterance.key for example in rows[:50]]
    assert first != sorted(first)
    switches = sum(a[0] != b[0] for a, b in pairwise(first))
    assert switches > 10  # the two tars of a block are mixed
    later = plan_epoch([WeightedSource(source)], TASKS, batch_seconds=BATCH_SECONDS, seed=SEED, epoch=1)
    assert {example.utterance.wav.tar for step in later for example in step} == set().union(*blocks)
    assert [e.utterance.key for step in later for e in step][:50] != first
