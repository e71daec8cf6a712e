"""Which utterances are trained on, in which order: one global plan for all ranks and workers.

The plan of an epoch follows from (seed, epoch) and the data alone. Ranks take shares of each of its steps, so the
state of a run is (epoch, steps done), on any number of ranks.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from osum_npu.audio.tar_member import TarMember
from osum_npu.tasks import Task, Utterance, get_task, missing

_BLOCK = 8192
"""Rows of tars that are shuffled together, those of eight tars of the usual size: large sets are read nearly as they
lie on the disk."""


class Example(NamedTuple):
    """One utterance and what is asked about it."""

    utterance: Utterance
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class WeightedSource:
    """Utterances and how often an epoch takes each: 1.5 is once, and a random half of them again."""

    utterances: Sequence[Utterance]
    weight: float = 1.0


def servable(utterance: Utterance, tasks: Mapping[str, float]) -> list[Task]:
    """Return those of ``tasks`` that the utterance has the labels for."""
    return [task for task in map(get_task, tasks) if not missing(task, utterance)]


def plan_epoch(
    sources: Sequence[WeightedSource],
    tasks: Mapping[str, float],
    *,
    batch_seconds: float,
    seed: int,
    epoch: int,
    questions: int = 1,
    shortest_first: bool = False,
) -> list[list[Example]]:
    """Plan the steps of one epoch.

    Every utterance that can serve a task comes as often as its source's weight says; nothing is left over. A step holds
    utterances of all lengths, for nothing is padded, and of all sources: steps of one length would each teach another
    kind of sound. Within a step they lie in falling length.

    Rows in tars are shuffled in blocks: the tars in random order, and the rows of some that follow each other among
    themselves. Rows with files of their own are spread over all blocks.

    Args:
        sources: the mixture.
        tasks: how often each task is drawn among those that an utterance can serve.
        batch_seconds: sound of one step, in the measure of :attr:`Utterance.seconds`; a single longer utterance makes a
            step of its own.
        seed: of the run.
        epoch: counts from 0.
        questions: how many different tasks are drawn for an utterance that can serve as many.
        shortest_first: take the utterances of epoch 0 in rising length instead of at random
            (SortaGrad; Amodei et al., Deep Speech 2, 2016).

    Raises:
        ValueError: no utterance can serve any of the tasks.
    """
    rng = random.Random(f"plan/{seed}/{epoch}")
    loose: list[Example] = []  # sounds in files of their own, and texts
    tars: dict[tuple[int, int, str], list[Example]] = {}
    for number, source in enumerate(sources):
        for turn, utterances in enumerate(_take(source, rng)):
            for utterance in utterances:
                if possible := servable(utterance, tasks):
                    asked = _draw(possible, tasks, questions, rng)
                    sound = utterance.wav
                    near = loose
                    if isinstance(sound, TarMember):
                        near = tars.setdefault((number, turn, sound.tar), [])
                    near.append(Example(utterance, asked))
    blocks = _blocks(loose, list(tars.values()), rng)
    if not any(blocks):
        raise ValueError(
            f"no utterance of the training data carries the labels for any of these tasks: {', '.join(tasks)}"
        )
    for block in blocks:
        rng.shuffle(block)
    if shortest_first and epoch == 0:
        blocks = [sorted((example for block in blocks for example in block), key=_seconds)]
    steps = [step for block in blocks for step in cut(block, batch_seconds)]
    return [sorted(step, key=_seconds, reverse=True) for step in steps]


def _draw(possible: list[Task], weights: Mapping[str, float], count: int, rng: random.Random) -> tuple[Task, ...]:
    """Draw different tasks, the likelier the higher their weights."""
    drawn: list[Task] = []
    while possible and len(drawn) < count:
        drawn += rng.choices(possible, [weights[task.name] for task in possible])
        possible = [task for task in possible if task is not drawn[-1]]
    return tuple(drawn)


def cut(examples: Sequence[Example], seconds: float) -> list[list[Example]]:
    """Cut examples into groups of at most ``seconds`` of sound; a longer one makes a group of its own."""
    groups: list[list[Example]] = []
    filled = 0.0
    for example in examples:
        filled += _seconds(example)
        if groups and filled <= seconds:
            groups[-1].append(example)
        else:
            groups.append([example])
            filled = _seconds(example)
    return groups


def share(examples: Sequence[Example], rank: int, ranks: int) -> list[Example]:
    """Return one rank's share of a step's examples: each goes to the rank that has the least sound so far.

    Args:
        examples: in falling length.
        rank: which share, from 0.
        ranks: number of shares.
    """
    loads = [(0.0, other) for other in range(ranks)]
    mine = []
    for example in examples:
        seconds, other = loads[0]
        heapq.heapreplace(loads, (seconds + _seconds(example), other))
        if other == rank:
            mine.append(example)
    return mine


def _take(source: WeightedSource, rng: random.Random) -> list[Sequence[Utterance]]:
    """Return what an epoch takes, turn by turn: all of the source as often as its weight is whole, then a part."""
    whole, fraction = divmod(source.weight, 1)
    some = rng.sample(range(len(source.utterances)), round(fraction * len(source.utterances)))
    return [source.utterances] * int(whole) + [[source.utterances[i] for i in sorted(some)]]


def _blocks(loose: list[Example], tars: list[list[Example]], rng: random.Random) -> list[list[Example]]:
    """Gather what is shuffled together: all in one block, unless tars are to be read a few at a time."""
    blocks: list[list[Example]] = [[]]
    rng.shuffle(tars)
    for tar in tars:
        if len(blocks[-1]) >= _BLOCK:
            blocks.append([])
        blocks[-1] += tar
    if len(blocks) > 1:
        rng.shuffle(loose)
    for number, block in enumerate(blocks):
        block += loose[number :: len(blocks)]
    return blocks


def _seconds(example: Example) -> float:
    return example.utterance.seconds
