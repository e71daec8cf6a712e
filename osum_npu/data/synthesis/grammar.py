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


def _share(text: str) -> float:
    """Spread texts evenly over 0 to 1, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def split_of(text: str) -> Split:
    """Assign a statement to a split by its hash: 70 % train, 5 % dev, 25 % test."""
    share = _share(text)
    return "train" if share < 0.70 else "dev" if share < 0.75 else "test"


@cache
def grammar() -> Mapping[str, Any]:
    """Return the parsed ``grammar.yaml``, by language."""
    table: Mapping[str, Any] = yaml.safe_load(files(__package__).joinpath("grammar.yaml").read_text("utf-8"))
    return table


def _facts(lang: str) -> Iterator[tuple[str, str]]:
    """Yield every fact that can be asked for, as a phrase, with its reply."""
    rules = grammar()[lang]
    for phrase, replies in rules["facts"].items():
        for topic, reply in replies.items():
            yield phrase.format(topic=topic), reply
    sums = rules["sums"]
    numbers, summands = sums["numbers"], range(sums["largest"] + 1)
    for a, b in itertools.product(summands, summands):
        yield sums["fact"].format(a=numbers[a], b=numbers[b]), numbers[a + b]


def questions(lang: str, split: Split) -> Iterator[Sentence]:
    """Yield the questions of a split with their replies.

    Every fact is asked for in every split, each time in other words: which wordings are whose follows from a hash,
    two for test, one for dev, the others for train. A reply can so be known, but no test question has been heard.
    """
    whose = slice(3, None) if split == "train" else slice(2, 3) if split == "dev" else slice(2)
    for fact, reply in _facts(lang):
        asked = sorted((ask.format(fact=fact) for ask in grammar()[lang]["ask"]), key=_share)
        yield from (Sentence(text, lang, reply) for text in asked[whose])


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
    pool = list(questions(lang, split))
    drawn: list[Sentence] = []
    while len(drawn) < count:
        drawn += rng.sample(pool, min(len(pool), count - len(drawn)))
    return drawn
