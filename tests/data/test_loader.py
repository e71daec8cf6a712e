"""The loader: any number of ranks and workers reads the same plan, from any place in it."""

from dataclasses import astuple
from itertools import islice

import pytest
import torch

from osum_npu.audio.augment import SpecAugmentConfig
from osum_npu.data.collate import Collator
from osum_npu.data.loader import Position, steps
from osum_npu.data.plan import WeightedSource, plan_epoch
from osum_npu.data.sources import read_source
from osum_npu.models.tokenizer import train_tokenizer

TASKS = {"asr": 1.0, "gender": 1.0, "timestamps": 1.0}
BATCH = 6.0
SEED = 11


@pytest.fixture(scope="module")
def sources(corpus):
    utterances, _ = read_source(corpus / "train.jsonl", 30)
    return [WeightedSource(utterances[:30], 1.5), WeightedSource(utterances[30:], 0.5)]


@pytest.fixture(scope="module")
def collate():
    return Collator(train_tokenizer(["do re mi"], [], 300), 80, SEED, SpecAugmentConfig(time_frames=10), 30)


def read(sources, collate, count, **options):
    return list(islice(steps(sources, TASKS, collate, batch_seconds=BATCH, **options), count))


def plans(sources, epochs):
    """All steps of the first epochs, as (key, task) pairs."""
    return [
        [(example.utterance.key, example.tasks[0].name) for example in step]
        for epoch in range(epochs)
        for step in plan_epoch(sources, TASKS, batch_seconds=BATCH, seed=SEED, epoch=epoch)
    ]


def asked(step):
    return [(example.utterance.key, example.tasks[0].name) for batch in step.batches for example in batch.examples]


def content(step):
    """All of a step that training sees, to the bit."""
    return [
        (
            batch.wave_BS.numpy().tobytes(),
            batch.samples,
            batch.prompts,
            batch.answers,
            batch.spellings,
            [[array.tobytes() for array in astuple(one)] for one in batch.drawn],
            asked(step),
        )
        for batch in step.batches
    ], step.after


def test_one_process_reads_the_plan_epoch_after_epoch(sources, collate):
    want = plans(sources, 2)
    first = len(plan_epoch(sources, TASKS, batch_seconds=BATCH, seed=SEED, epoch=0))
    got = read(sources, collate, len(want))
    assert [asked(step) for step in got] == want
    assert [step.after for step in got[:first]] == [*(Position(0, n) for n in range(1, first)), Position(1, 0)]
    assert got[-1].after == Position(2, 0)


@pytest.mark.parametrize("micro", [None, 2.5])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_every_step_among_them(sources, collate, world_size, micro):
    want = plans(sources, 1)
    shares = [
        read(sources, collate, len(want), rank=rank, world_size=world_size, micro_batch_seconds=micro)
        for rank in range(world_size)
    ]
    for whole, *parts in zip(want, *shares, strict=True):
        pieces = [asked(part) for part in parts]
        assert sorted(pair for piece in pieces for pair in piece) == sorted(whole)
        assert sum(map(len, pieces)) == len(whole)
        samples = [[n for batch in part.batches for n in batch.samples] for part in parts]
        loads = [sum(each) for each in samples]
        assert max(loads) - min(loads) <= max(n for each in samples for n in each)
        assert len({part.after for part in parts}) == 1
        for part in parts:
            for batch in part.batches:
                assert micro is None or len(batch.samples) == 1 or sum(batch.samples) <= micro * 16000 + 1


@pytest.mark.parametrize(("world_size", "micro"), [(1, None), (2, 2.5), (3, None)])
def test_a_run_goes_on_from_any_position_on_any_number_of_ranks(sources, collate, world_size, micro):
    epoch = len(plan_epoch(sources, TASKS, batch_seconds=BATCH, seed=SEED, epoch=0))
    count = epoch + 4
    alone = read(sources, collate, count)
    for done in (1, epoch - 1, epoch, epoch + 2):
        start = alone[done - 1].after
        shares = [
            read(
                sources,
                collate,
                count - done,
                start=start,
                rank=rank,
                world_size=world_size,
                micro_batch_seconds=micro,
            )
            for rank in range(world_size)
        ]
        for whole, *parts in zip(alone[done:], *shares, strict=True):
            assert sorted(pair for part in parts for pair in asked(part)) == sorted(asked(whole))
            assert {part.after for part in parts} == {whole.after}
        if world_size == 1:
            assert [content(step) for step in shares[0]] == [content(step) for step in alone[done:]]


@pytest.mark.parametrize("micro", [None, 2.5])
def test_workers_read_the_same_to_the_bit(sources, collate, micro):
    count = len(plans(sources, 1)) + 2
    here = read(sources, collate, count, micro_batch_seconds=micro)
    there = read(sources, collate, count, micro_batch_seconds=micro, workers=2)
    assert [content(step) for step in there] == [content(step) for step in here]
    assert len({step.batches[0].wave_BS.shape for step in here}) > 1


def test_the_loader_leaves_the_random_state_alone(sources, collate):
    before = torch.get_rng_state()
    read(sources, collate, len(plans(sources, 1)) + 1)
    assert torch.equal(torch.get_rng_state(), before)
