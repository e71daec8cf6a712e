"""What people say when they want something: instructions in natural language, put together from parts.

An instruction is one wish or several, in a frame, as sentences of their own or as a list of things, with or without an
opening, chatter, and a word on what is *not* wanted. Labels are answered in the order in which they are wished for; the
transcript may be wished for first or last. Each part belongs to one split, so a model is tested on phrases that it has
not been trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import accumulate, chain, product
from math import sqrt
from typing import Any, Literal

import yaml

from osum_npu.tasks.task import Task
from osum_npu.tasks.text import split_words

Split = Literal["train", "test"]
LANGUAGES = ("zh", "en")

_OPENING, _BEFORE, _AFTER, _REFUSAL = 0.4, 0.2, 0.2, 0.3
"""How often an instruction has each of these."""
_COMPOSED = 0.6
"""How often a wish is put together from a verb and an object."""
_SENTENCES = 0.3
"""How often each wish is a sentence or a question of its own."""
_LISTED = 0.15
"""How often all wishes are a list of things: "the text and the age, please"."""
_TRANSCRIPT_LAST = 0.3

_CHOICE = re.compile(r"\[([^\]]*)\]")

_STOP = {"zh": ("。", "？", ""), "en": (".", "?", " ")}
"""What ends a wish and a question, and what stands between two sentences."""


@dataclass(frozen=True)
class Phrases:
    """What a list of patterns can say; in a pattern, ``[a|b]`` is one of its alternatives."""

    patterns: tuple[tuple[str, ...], ...]
    """The phrases of each pattern."""
    _weights: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # between one pattern as often as another, which wastes the rich ones, and one phrase as often as another,
        # which drowns the lone ones
        object.__setattr__(self, "_weights", tuple(accumulate(sqrt(len(said)) for said in self.patterns)))

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.patterns)

    def draw(self, rng: random.Random) -> str:
        """Draw a phrase: of a pattern that has more of them sooner, by the root of their number."""
        return rng.choice(rng.choices(self.patterns, cum_weights=self._weights)[0])


def spell_out(pattern: str) -> tuple[str, ...]:
    """Return all phrases of a pattern, in order: ``"[a|b] c"`` makes ``a c`` and ``b c``."""
    choices = [piece.split("|") if number % 2 else [piece] for number, piece in enumerate(_CHOICE.split(pattern))]
    return tuple("".join(chosen) for chosen in product(*choices))


@cache
def parts(lang: str, split: Split) -> Mapping[str, Any]:
    """Return the parts of a language and split, as ``instructions_*.yaml`` explain them; lists are :class:`Phrases`."""

    def read(told: Any) -> Any:
        if isinstance(told, Mapping):
            return {name: read(each) for name, each in told.items()}
        return told if isinstance(told[0], list) else Phrases(tuple(map(spell_out, told)))

    found: Mapping[str, Any] = read(_table(lang)[split])
    return found


@cache
def _table(lang: str) -> dict[str, Any]:
    text = files("osum_npu.tasks").joinpath(f"instructions_{lang}.yaml").read_text("utf-8")
    # libyaml's reader takes a tenth of the time, where PyYAML has been built with it
    table: dict[str, Any] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return table


def can_be_asked(task: Task) -> bool:
    """Say whether an instruction can ask for ``task``: any task about a recording but those that think."""
    return task.kind in ("text", "chat")


def wishes(task: Task) -> tuple[str, ...]:
    """Return what an instruction has to wish for so that it asks for ``task``, in the order of the answer.

    Raises:
        ValueError: ``task`` is not asked for by an instruction about a recording.
    """
    if not can_be_asked(task):
        raise ValueError(f"task {task.name!r} is not asked for by an instruction about a recording")
    asked = ("chat",) if task.kind == "chat" else tuple(choice.name for choice in task.choices)
    if task.name == "timestamps":
        return ("timestamps",)
    return ("asr", *asked) if task.transcript else asked


def draw_instruction(task: Task, split: Split, rng: random.Random, lang: str | None = None) -> str:
    """Make up an instruction that asks for ``task``.

    Args:
        task: any that can be asked for.
        split: whose words to use.
        rng: decides everything.
        lang: ``zh`` or ``en``; drawn if not given.

    Raises:
        ValueError: ``task`` is not asked for by an instruction about a recording.
    """
    wanted = list(wishes(task))
    lang = lang or rng.choice(LANGUAGES)
    told = parts(lang, split)
    if wanted[0] == "asr" and rng.random() < _TRANSCRIPT_LAST:
        wanted = [*wanted[1:], "asr"]
    form = rng.random()
    if form < _SENTENCES:
        sentences = list(_sentences(told, wanted, rng, lang))
    elif form < _SENTENCES + _LISTED:
        things = _joined([told["names"][wish].draw(rng) for wish in wanted], told["lists"], rng)
        sentences = [told["requests"].draw(rng).format(things=things)]
    else:
        phrases = _joined([_phrase(told, wish, rng) for wish in wanted], told["joins"], rng)
        sentences = [told["frames"].draw(rng).format(wish=phrases)]
    if rng.random() < _REFUSAL:
        refusal = told["refusals"].draw(rng).format(name=told["names"][_unwanted(task, told, rng)].draw(rng))
        sentences.insert(rng.choice((0, len(sentences))), refusal)
    if rng.random() < _BEFORE:
        sentences.insert(0, told["before"].draw(rng))
    if rng.random() < _AFTER:
        sentences.append(told["after"].draw(rng))
    if rng.random() < _OPENING:
        sentences[0] = told["openings"].draw(rng) + sentences[0]
    return _STOP[lang][2].join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def _joined(phrases: Sequence[str], joins: Sequence[tuple[str, str]], rng: random.Random) -> str:
    """Put phrases together; ``joins`` are what stands between two of them, and before the last one."""
    between, last = rng.choice(joins)
    *first, end = phrases
    return f"{between.join(first)}{last}{end}" if first else end


def _sentences(told: Mapping[str, Any], wanted: Iterable[str], rng: random.Random, lang: str) -> Iterator[str]:
    """Make a sentence or a question of each wish."""
    stop, mark, _ = _STOP[lang]
    for wish in wanted:
        if (asked := told["questions"].get(wish)) and rng.random() < 0.5:
            yield asked.draw(rng) + mark
        else:
            yield _phrase(told, wish, rng) + stop


def _phrase(told: Mapping[str, Any], wish: str, rng: random.Random) -> str:
    """Draw a verb phrase that asks for a wish."""
    whole: Phrases = told["wishes"][wish]
    if rng.random() >= _COMPOSED:
        return whole.draw(rng)
    verbs: Phrases = told["verbs"].get(wish) or told["verbs"]["any"]
    return verbs.draw(rng).format(object=told["objects"][wish].draw(rng))


def _unwanted(task: Task, told: Mapping[str, Any], rng: random.Random) -> str:
    """Draw something that ``task`` does not ask for."""
    asked = {*wishes(task), "asr"} if task.transcript else {*wishes(task)}
    return rng.choice([str(wish) for wish in told["names"] if wish not in asked])


def shared_ngrams(train: Iterable[str], test: Iterable[str], length: int = 4) -> float:
    """Return the share of different runs of ``length`` words or Han characters in ``test`` that ``train`` has, too."""

    def ngrams(texts: Iterable[str]) -> set[tuple[str, ...]]:
        units = (split_words(text.lower()) for text in texts)
        return {tuple(words[i : i + length]) for words in units for i in range(len(words) - length + 1)}

    tested = ngrams(test)
    return len(tested & ngrams(train)) / len(tested) if tested else 0.0
