"""Which utterances are trained on, in which order: one global plan for all ranks and workers.

The plan of an epoch follows from (seed, epoch) and the data alone. Ranks take slices of each of its steps, so the
state of a run is (epoch, steps done), on any number of ranks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from osum_npu.tasks import TASKS, Task, Utterance, missing

_WINDOW = 24
"""Batches' worth of utterances that are sorted by length together: similar lengths, still a random order."""


LENGTH_STEP = 0.16
"""Seconds in which the length of a batch grows. Libraries prepare a kernel for each shape and keep it, so a few shapes
that come again are faster than the least padding: a quarter less time for a small model on a CPU."""


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
    return [TASKS[name] for name in tasks if not missing(TASKS[name], utterance)]


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

    Every utterance that can serve a task comes as often as its source's weight says; nothing is left over. Within a
    step, utterances are of similar length and lie in falling length.

    Args:
        sources: the mixture.
        tasks: how often each task is drawn among those that an utterance can serve.
        batch_seconds: sound of one step with padding; a single longer utterance makes a step of its own.
        seed: of the run.
        epoch: counts from 0.
        questions: how many different tasks are drawn for an utterance that can serve as many.
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
                examples.append(Example(utterance, _draw(possible, tasks, questions, rng)))
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


def _draw(possible: list[Task], weights: Mapping[str, float], count: int, rng: random.Random) -> tuple[Task, ...]:
    """Draw different tasks, the likelier the higher their weights."""
    drawn: list[Task] = []
    while possible and len(drawn) < count:
        drawn += rng.choices(possible, [weights[task.name] for task in possible])
        possible = [task for task in possible if task is not drawn[-1]]
    return tuple(drawn)


def padded_length(seconds: float) -> float:
    """Return to how many seconds a batch is padded whose longest utterance has ``seconds``."""
    return math.ceil(seconds / LENGTH_STEP) * LENGTH_STEP


def cut(examples: Sequence[Example], seconds: float) -> list[list[Example]]:
    """Cut examples in falling length into groups of at most ``seconds`` of sound, padding counted."""
    groups: list[list[Example]] = []
    for example in examples:
        if groups and (len(groups[-1]) + 1) * padded_length(_seconds(groups[-1][0])) <= seconds:
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
