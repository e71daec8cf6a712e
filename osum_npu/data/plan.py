"""Which utterances are trained on, in which order: one global plan for all ranks and workers.

The plan of an epoch follows from (seed, epoch) and the data alone. Ranks take slices of each of its steps, so the
state of a run is (epoch, steps done), on any number of ranks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from osum_npu.tasks import Task, Utterance, get_task, missing

_WINDOW = 24
"""Batches' worth of utterances that are sorted by length together: similar lengths, still a random order."""


class Example(NamedTuple):
    """One utterance and what is asked about it."""

    utterance: Utterance
    task: Task


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
    shortest_first: bool = False,
) -> list[list[Example]]:
    """Plan the steps of one epoch.

    Every utterance that can serve a task comes as often as its source's weight says; nothing is left over. Within a
    step, utterances are of similar length and lie in falling length.

    Args:
        sources: the mixture.
        tasks: how often each task is drawn among those that an utterance can serve.
        batch_seconds: sound of one step with padding; a single longer utterance makes a step of its own.
        seed: of the run.
        epoch: counts from 0.
        shortest_first: put the steps of epoch 0 in rising length instead of at random
            (SortaGrad; Amodei et al., Deep Speech 2, 2016).

    Raises:
        ValueError: no utterance can serve any of the tasks.
    """
    rng = random.Random(f"plan/{seed}/{epoch}")
    examples: list[Example] = []
    for source in sources:
        for utterance in _take(source, rng):
            if possible := servable(utterance, tasks):
                task = rng.choices(possible, [tasks[task.name] for task in possible])[0]
                examples.append(Example(utterance, task))
    if not examples:
        raise ValueError(
            f"no utterance of the training data carries the labels for any of these tasks: {', '.join(tasks)}"
        )
    rng.shuffle(examples)
    mean = sum(_seconds(example) for example in examples) / len(examples)
    window = max(1, round(_WINDOW * batch_seconds / mean))
    steps: list[list[Example]] = []
    for start in range(0, len(examples), window):
        ordered = sorted(examples[start : start + window], key=_seconds, reverse=True)
        steps += cut(ordered, batch_seconds)
    rng.shuffle(steps)
    if shortest_first and epoch == 0:
        steps.sort(key=lambda step: _seconds(step[0]))
    return steps


def cut(examples: Sequence[Example], seconds: float) -> list[list[Example]]:
    """Cut examples in falling length into groups of at most ``seconds`` of sound, padding counted."""
    groups: list[list[Example]] = []
    for example in examples:
        if groups and (len(groups[-1]) + 1) * _seconds(groups[-1][0]) <= seconds:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def _take(source: WeightedSource, rng: random.Random) -> list[Utterance]:
    whole, fraction = divmod(source.weight, 1)
    some = rng.sample(range(len(source.utterances)), round(fraction * len(source.utterances)))
    return list(source.utterances) * int(whole) + [source.utterances[i] for i in sorted(some)]


def _seconds(example: Example) -> float:
    return example.utterance.duration or 0.0
