"""Sentences and questions of the synthesized corpus, split so that no test sentence is ever trained on."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import yaml

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

_SLOT = re.compile(r"\{(\w+)\}")


class Sentence(NamedTuple):
    """What is said and, for a question, what a chat partner would reply."""

    text: str
    lang: str
    reply: str | None = None


def split_of(text: str) -> Split:
    """Assign a sentence to a split by its hash: 70 % train, 5 % dev, 25 % test. The same on every machine."""
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.70 else "dev" if share < 0.75 else "test"


@cache
def grammar() -> Mapping[str, Any]:
    """Return the parsed ``grammar.yaml``, by language."""
    table: Mapping[str, Any] = yaml.safe_load(files(__package__).joinpath("grammar.yaml").read_text("utf-8"))
    return table


def questions(lang: str) -> Iterator[Sentence]:
    """Yield every question of a language with its reply."""
    for group in grammar()[lang]["questions"]:
        for ask, (topic, reply) in itertools.product(group["ask"], group["facts"].items()):
            yield Sentence(ask.format(topic=topic), lang, reply)
    sums = grammar()[lang]["sums"]
    numbers, summands = sums["numbers"], range(sums["largest"] + 1)
    for ask, a, b in itertools.product(sums["ask"], summands, summands):
        yield Sentence(ask.format(a=numbers[a], b=numbers[b]), lang, numbers[a + b])


def statement(lang: str, rng: random.Random) -> Sentence:
    """Draw one sentence that is no question."""
    rules = grammar()[lang]
    template = rng.choice(rules["sentences"])
    return Sentence(_SLOT.sub(lambda slot: rng.choice(rules["lists"][slot[1]]), template), lang)


def draw_statements(lang: str, split: Split, count: int, rng: random.Random) -> list[Sentence]:
    """Draw ``count`` different statements of a split."""
    drawn: dict[str, Sentence] = {}
    while len(drawn) < count:
        sentence = statement(lang, rng)
        if split_of(sentence.text) == split:
            drawn[sentence.text] = sentence
    return list(drawn.values())


def draw_questions(lang: str, split: Split, count: int, rng: random.Random) -> list[Sentence]:
    """Draw ``count`` questions of a split, each once before any comes twice."""
    pool = [q for q in questions(lang) if split_of(q.text) == split]
    drawn: list[Sentence] = []
    while len(drawn) < count:
        drawn += rng.sample(pool, min(len(pool), count - len(drawn)))
    return drawn
