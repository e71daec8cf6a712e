"""Feeds the training loop: endless steps from the global plan, read ahead by worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from osum_npu.data.collate import Batch, Collator
from osum_npu.data.plan import Example, WeightedSource, cut, plan_epoch, share


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data; the same on every rank and for any number of ranks."""

    epoch: int = 0
    step: int = 0
    """Steps of this epoch already done."""


@dataclass(frozen=True)
class Step:
    """This rank's part of one optimiser step."""

    batches: list[Batch]
    after: Position
    """Where the run stands once this step is done."""


class _Steps(Dataset[list[Batch]]):
    """The steps of one epoch; item ``i`` is read and collated in a worker."""

    def __init__(self, parts: Sequence[Sequence[Sequence[Example]]], collate: Collator, epoch: int) -> None:
        self.parts, self.collate, self.epoch = parts, collate, epoch

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> list[Batch]:
        return [self.collate(examples, self.epoch) for examples in self.parts[index]]


def _end_with_the_training(_: int) -> None:
    """Let a worker end with its training alone: schedulers send SIGTERM to all processes of a run that is to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def steps(
    sources: Sequence[WeightedSource],
    tasks: Mapping[str, float],
    collate: Collator,
    *,
    batch_seconds: float,
    micro_batch_seconds: float | None = None,
    questions: int = 1,
    shortest_first: bool = False,
    start: Position = Position(),
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[Step]:
    """Yield this rank's share of step after step, epoch after epoch.

    Args:
        sources: the mixture.
        tasks: weights of the tasks.
        collate: makes batches.
        batch_seconds: sound of one step over all ranks.
        micro_batch_seconds: sound computed at once; the rank's whole share by default.
        questions: tasks asked about an utterance.
        shortest_first: epoch 0 in rising length.
        start: where to go on.
        rank: of this process.
        world_size: number of processes.
        workers: processes that read ahead; 0 reads in this one.
    """
    position = start
    while True:
        plan = plan_epoch(
            sources,
            tasks,
            batch_seconds=batch_seconds,
            seed=collate.seed,
            epoch=position.epoch,
            questions=questions,
            shortest_first=shortest_first,
        )
        shares = [share(step, rank, world_size) for step in plan[position.step :]]
        parts = [[share] if micro_batch_seconds is None else cut(share, micro_batch_seconds) for share in shares]
        loader = DataLoader(
            _Steps(parts, collate, position.epoch),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_end_with_the_training,
            # of its own: torch draws from it with every epoch, which would shift the dropout of a resumed run
            generator=torch.Generator(),
        )
        for done, batches in enumerate(loader, position.step + 1):
            last = done == len(plan)
            yield Step(batches, Position(position.epoch + 1, 0) if last else Position(position.epoch, done))
        position = Position(position.epoch + 1, 0)
