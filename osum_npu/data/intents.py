"""Data that teaches which task an instruction asks for: instructions alone, without sound.

OSUM-Pangu learns them in its second stage (ASLP-lab/OSUM-Pangu, README.md).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from osum_npu.files import write_text
from osum_npu.tasks import Task
from osum_npu.tasks.instructions import LANGUAGES, Split, draw_instruction, shared_ngrams

Part = Literal["train", "dev", "test"]
PARTS: tuple[Part, ...] = ("train", "dev", "test")
_TRIES = 100
_WORDS: Mapping[Part, Split] = {"train": "train", "dev": "train", "test": "test"}
"""Whose words a part has: dev says them in other sentences than train."""
NGRAM = 4
"""Length of the runs of words that are compared between train and test."""


class Intents(NamedTuple):
    """What :func:`write_intents` wrote."""

    rows: dict[Part, int]
    shared: float
    """Share of the runs of :data:`NGRAM` words or Han characters in test that train has, too."""


def write_intents(out: Path, counts: Mapping[Part, int], tasks: Sequence[Task], seed: int) -> Intents:
    """Write ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``: instructions without sound, each with its task's name.

    Tasks and languages come equally often, as far as the count allows. No instruction comes twice, in one part or in
    two.

    Args:
        out: folder to write.
        counts: rows by part.
        tasks: what is asked for.
        seed: decides everything.

    Raises:
        ValueError: a task is not asked for by an instruction, or there are fewer instructions than rows.
    """
    out.mkdir(parents=True, exist_ok=True)
    used: set[str] = set()
    told: dict[Part, list[str]] = {}
    for part in PARTS:
        rows = list(_intents(part, counts[part], tasks, seed, used))
        told[part] = [row["prompt"] for row in rows]
        write_text(out / f"{part}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    shared = shared_ngrams(told["train"], told["test"], NGRAM)
    return Intents({part: len(prompts) for part, prompts in told.items()}, shared)


def _intents(part: Part, count: int, tasks: Sequence[Task], seed: int, used: set[str]) -> Iterator[dict[str, str]]:
    rng = random.Random(f"intents/{seed}/{part}")
    wanted = [(task, lang) for task in tasks for lang in LANGUAGES]
    for number in range(count):
        task, lang = wanted[number % len(wanted)]
        for _ in range(_TRIES):
            prompt = draw_instruction(task, _WORDS[part], rng, lang)
            if prompt not in used:
                break
        else:
            raise ValueError(f"there are too few different instructions for {count} rows of {part}; ask for less")
        used.add(prompt)
        yield {"key": f"intent_{part}_{number:06d}", "prompt": prompt, "intent": task.name, "lang": lang}
