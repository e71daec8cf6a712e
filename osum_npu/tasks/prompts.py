"""Instructions given to the model, several wordings a task: this project's own, or those of a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from osum_npu.tasks.task import LISTED, Task, get_task
from osum_npu.tasks.utterance import Utterance

Prompts = Mapping[str, Sequence[str]]
"""Wordings by task name."""

NO_PROMPT = "<no_prompt>"
"""A prompt that stands for none at all: the sequence then begins with the speech (ASLP-lab/OSUM, its data pipeline)."""

PROMPT_CHARACTERS = 4000
"""Longest instruction. OSUM-Pangu's training takes 900 tokens of instruction, sound and answer together."""


@cache
def prompts() -> Prompts:
    """Return the project's own wordings of the listed tasks, read from ``prompts.yaml``."""
    table = _own()
    return {name: tuple(table[name]) if name in table else _several(task) for name, task in LISTED.items()}


def wordings_of(task: Task, wordings: Prompts) -> Sequence[str]:
    """Return the instructions for ``task``: those of ``wordings``, or the project's own for a further combination."""
    return wordings.get(task.name) or _several(task)


@cache
def _own() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(files("osum_npu.tasks").joinpath("prompts.yaml").read_text("utf-8"))
    return table


@cache
def _several(task: Task) -> tuple[str, ...]:
    """Put the instructions for several labels in one answer together."""
    told = _own()["several"]
    return tuple(
        wording.format(labels=_enumerate([told["words"][lang][part.name] for part in task.parts], *glue))
        for lang, glue in (("zh", ("、", "和")), ("en", (", ", " and ")))
        for wording in told["transcript" if task.transcript else "labels only"][lang]
    )


def _enumerate(words: Sequence[str], between: str, last: str) -> str:
    return f"{between.join(words[:-1])}{last}{words[-1]}"


def read_prompts(path: str | Path | None) -> tuple[Prompts, str]:
    """Read the wordings that a released checkpoint was trained with.

    Args:
        path: YAML that maps each tag string (``<TRANSCRIBE> <GENDER>``, with or without spaces) to a list of sentences,
            as ASLP-lab/OSUM's prompt configuration does; names and codes of tasks serve too. ``None`` for no file.

    Returns:
        (own wordings, replaced where the file has others; a line that names the tags of no task, which are ignored, or
        nothing).

    Raises:
        ValueError: the file cannot be read, or is of another form.
    """
    if path is None:
        return prompts(), ""
    wordings, unknown = dict(prompts()), []
    for tag, sentences in _table(path).items():
        try:
            wordings[get_task(tag).name] = sentences
        except ValueError:
            unknown.append(tag)
    return wordings, f"{path}: ignored, as of no task here: {', '.join(unknown)}" if unknown else ""


def draw_prompt(utterance: Utterance, task: Task, wordings: Prompts, rng: random.Random) -> str:
    """Return the utterance's own instruction, or one of the task's drawn at random, for training; empty for none."""
    return _asked(utterance, task, lambda: rng.choice(wordings_of(task, wordings)))


def first_prompt(utterance: Utterance, task: Task, wordings: Prompts) -> str:
    """Return the utterance's own instruction, or the task's first, for inference; empty for none."""
    return _asked(utterance, task, lambda: wordings_of(task, wordings)[0])


def prompt_fault(prompt: str | None) -> str:
    """Say what is wrong with an instruction that a user gives; empty where nothing is."""
    if prompt is None or len(prompt) <= PROMPT_CHARACTERS:
        return ""
    return f"the prompt has {len(prompt)} characters, more than the {PROMPT_CHARACTERS} that are allowed; shorten it"


def _asked(utterance: Utterance, task: Task, wording: Callable[[], str]) -> str:
    """Take the utterance's own instruction if it says anything; the intent task asks what such an instruction wants."""
    own = utterance.prompt if utterance.prompt and not utterance.prompt.isspace() else ""
    if task.kind == "intent":
        return ":".join(filter(None, (_written(wording()), own)))
    return _written(own or wording())


def _written(prompt: str) -> str:
    return "" if prompt == NO_PROMPT else prompt


def _table(path: str | Path) -> dict[str, tuple[str, ...]]:
    try:
        table: Any = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: the prompts cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: the prompts are no YAML in UTF-8: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path}: wanted tags, each with a list of sentences: '<TRANSCRIBE>: [sentence, sentence]'")
    faults = [
        f"{tag}: {wordings!r:.60}"
        for tag, wordings in table.items()
        if not (isinstance(tag, str) and isinstance(wordings, list) and wordings and all(map(_is_sentence, wordings)))
    ]
    if faults:
        raise ValueError(f"{path}: wanted a list of sentences for each tag, got {'; '.join(faults)}")
    return {tag: tuple(wordings) for tag, wordings in table.items()}


def _is_sentence(wording: object) -> bool:
    return isinstance(wording, str) and bool(wording.strip())
