"""One row of a manifest, checked and turned into an utterance.

A row is a JSON object with the fields of ``FIELDS``; ``key`` and ``wav`` are needed, a missing or null field means not
labelled. A row about text alone has no ``wav``, but a ``prompt``. ``wav`` is relative to the manifest's folder or
absolute. Times are in seconds: ``start`` and ``end`` choose a span of the file, ``duration`` is the length of that
span, and ``words``, ``[[word, start, end], ...]``, count from its beginning.

A row with a ``task`` is of OSUM's own ``raw`` form (ASLP-lab/OSUM, its data lists): the labels stand inside ``txt`` as
the task's answer writes them, for example ``{"task": "<TRANSCRIBE> <GENDER>", "txt": "hello<male>"}``; other
fields may be in brackets (``"lang": "<CN>"``) and ``<NONE>`` means null. In OSUM-Pangu's lists, ``extra`` holds the
instruction and the thought, as ``question`` and ``think_str``.
"""

from __future__ import annotations

import math
import os
import re
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from osum_npu.tasks import (
    LISTED,
    SYNONYMS,
    TASKS,
    Task,
    Utterance,
    Word,
    get_task,
    normalize_text,
    prompt_fault,
    read,
)

DURATION_TOLERANCE = 0.1
"""Seconds by which two statements of one length may differ: manifests round, and codecs pad their last frame."""

FIELDS: dict[str, type] = {
    **dict.fromkeys(("key", "wav", "txt", "lang", "speaker", "reply", "prompt", "thought", "intent"), str),
    **dict.fromkeys(("translation", "task"), str),
    **{task.name: str for task in TASKS.values() if task.labels},
    **dict.fromkeys(("duration", "start", "end", "age_years"), float),
    **dict.fromkeys(("words", "speech_token"), list),
    "extra": dict,
}
"""All fields by type. ``translation``, ``age_years`` and ``speech_token`` are known and not used; so is
``extra``, but in a row with a ``task``."""
OF_SOUND = ("words", "start", "end", "duration")
"""Fields that speak of a sound."""

STYLE_NAMES = {
    "朗读": "新闻科普",
    "科普百科": "新闻科普",
    "悬疑恐怖": "恐怖故事",
    "诗歌": "诗歌散文",
    "散文": "诗歌散文",
    "武侠评书": "有声书",
    "小说": "有声书",
    "历史": "有声书",
    "科幻": "有声书",
    "对话": "日常口语",
    "口语": "日常口语",
    "幽默": "其他",
    "news": "新闻科普",
    "horror story": "恐怖故事",
    "fairy tale": "童话故事",
    "customer service": "客服",
    "poetry": "诗歌散文",
    "audiobook": "有声书",
    "conversation": "日常口语",
    "other": "其他",
}
"""Other names of the eight styles: the finer genres that OSUM's lists use, and English ones."""

_TYPE_NAMES = {str: "text", float: "a number", list: "a list", dict: "an object"}
_JSON_NAMES = {
    str: "text",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bool: "true or false",
}
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
_COUNTRIES = {"cn": "zh"}  # OSUM's lists write <CN> for Mandarin
_MARK = re.compile(r"<([^<>]*)>")
_LABELLED = tuple(task for task in TASKS.values() if task.labels)
_NOT_SAID = re.compile(r"[\W_]+")


def parse_row(row: object, folder: str) -> tuple[Utterance | None, list[str]]:
    """Turn a decoded JSON line into an utterance.

    Args:
        row: what ``json.loads`` gave.
        folder: what a relative ``wav`` starts from.

    Returns:
        The utterance and no faults, or ``None`` and all faults of the row in words.
    """
    if not isinstance(row, dict):
        return None, [f"the line holds {_JSON_NAMES.get(type(row), 'null')}; a row is a JSON object"]
    faults: list[str] = []
    given = _typed(row, faults)
    if row.get("key") is None:
        faults.append("no key")
    for name in ("key", "wav", "txt", "reply", "prompt", "thought", "intent"):
        if name in given and not given[name].strip():
            faults.append(f"{name} is empty" + ("" if name in ("key", "wav") else "; write null where there is none"))
    if "task" in given:
        _unwrap(given, faults)
    elif marks := _MARK.findall(given.get("txt", "")):
        faults.append(f"txt holds <{marks[0]}>, which reads as a label; remove it, or name the row's task")
    if row.get("wav") is None:
        _check_text_alone(given, faults)
    labels = _labels(given, faults)
    if "lang" in given and not _LANGUAGE.fullmatch(given["lang"]):
        faults.append(f"lang {given['lang']!r} is no language code; write two or three letters, such as en, zh or yue")
    intent = _intent(given, faults)
    duration = _times(given, faults)
    words = _words(given, duration, faults)
    if faults:
        return None, faults
    return Utterance(
        key=given["key"],
        wav=os.path.join(folder, given["wav"]) if "wav" in given else None,
        duration=duration,
        start=given.get("start", 0.0),
        end=given.get("end"),
        text=normalize_text(given.get("txt", "")).strip() or None,
        lang=given.get("lang"),
        speaker=given.get("speaker"),
        words=words,
        labels=labels,
        reply=given.get("reply"),
        prompt=given.get("prompt"),
        thought=given.get("thought"),
        intent=intent,
    ), []


def closest(name: str, names: list[str]) -> str:
    """Write ``; did you mean 'x'?`` for the one of ``names`` that is spelt like ``name``; nothing where none is."""
    near = get_close_matches(name.lower(), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _typed(row: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """Keep the fields that are known, not null and of the right type."""
    given: dict[str, Any] = {}
    for name, value in row.items():
        kind = FIELDS.get(name)
        if kind is None:
            faults.append(f"unknown field {name!r}{closest(name, list(FIELDS))}")
        elif value is None:
            continue
        elif kind is float and type(value) in (int, float):
            given[name] = _seconds(value)
        elif not isinstance(value, kind):
            faults.append(f"{name} must be {_TYPE_NAMES[kind]}, not {_JSON_NAMES[type(value)]}: {value!r:.60}")
        elif isinstance(value, str) and (fault := _unwritable(value)):
            faults.append(f"{name} holds {fault}")
        else:
            given[name] = value
    return given


def _seconds(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf


def _unwritable(text: str) -> str:
    if "\0" in text:
        return "a null byte"
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        return "half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    return ""


def _labels(given: dict[str, Any], faults: list[str]) -> dict[str, str]:
    labels = {}
    for task in _LABELLED:
        if (label := given.get(task.name)) is None:
            continue
        if task.name == "style":
            label = STYLE_NAMES.get(label, label)
        if label in task.labels:
            labels[task.name] = label
        else:
            names = [*task.labels, *(STYLE_NAMES if task.name == "style" else ())]
            faults.append(f"{task.name} {label!r} is none of {', '.join(task.labels)}{closest(label, names)}")
    return labels


def _intent(given: dict[str, Any], faults: list[str]) -> str | None:
    """Return the name of the task that the row's instruction asks for, and check the instruction."""
    if fault := prompt_fault(given.get("prompt")):
        faults.append(fault)
    if "intent" not in given:
        return None
    if "prompt" not in given:
        faults.append("an intent says what the prompt asks for, and there is no prompt")
    try:
        return get_task(given["intent"]).name
    except ValueError as error:
        faults.append(f"intent: {error}{closest(given['intent'], list(LISTED))}")
        return None


def _times(given: dict[str, Any], faults: list[str]) -> float | None:
    """Check ``start``, ``end`` and ``duration``; return the duration, taken from the span where it is not given."""
    start: float = given.get("start", 0.0)
    end: float | None = given.get("end")
    duration: float | None = given.get("duration")
    if not (math.isfinite(start) and start >= 0):
        faults.append(f"start must be 0 or more seconds, not {start:g}")
    if end is not None and not (math.isfinite(end) and end > start):
        faults.append(f"end must lie after start ({start:g} s), not at {end:g} s")
        return duration
    if duration is None:
        return None if end is None else end - start
    if not (math.isfinite(duration) and duration > 0):
        faults.append(f"duration must be more than 0 seconds, not {duration:g}")
    elif end is not None and not abs(end - start - duration) <= DURATION_TOLERANCE:
        faults.append(f"duration {duration:g} s disagrees with the {end - start:g} s from start to end")
    return duration


def _words(given: dict[str, Any], duration: float | None, faults: list[str]) -> tuple[Word, ...] | None:
    items = given.get("words")
    if items is None:
        return None
    words = []
    for number, item in enumerate(items, 1):
        match item:
            case [str(text), (int() | float()) as start, (int() | float()) as end] if text.strip():
                words.append(Word(normalize_text(text).strip(), _seconds(start), _seconds(end)))
            case _:
                faults.append(f"word {number} must be [text, start, end], not {item!r:.60}")
                return None
    if not words:
        faults.append("words is an empty list; write null where there are none")
        return None
    for word in words:
        if not 0 <= word.start <= word.end < math.inf:
            faults.append(f"word {word.text!r} lasts from {word.start:g} to {word.end:g} s")
    for before, after in pairwise(words):
        if after.start < before.start:
            faults.append(f"word {after.text!r} at {after.start:g} s follows {before.text!r} at {before.start:g} s")
    if duration is not None and (last := max(word.end for word in words)) > duration + DURATION_TOLERANCE:
        faults.append(f"words end at {last:g} s, beyond the duration of {duration:g} s")
    said = "".join(word.text for word in words)
    if _NOT_SAID.sub("", said) != _NOT_SAID.sub("", normalize_text(given.get("txt", ""))):
        faults.append(f"words say {' '.join(word.text for word in words)!r:.60}, txt says {given.get('txt')!r:.60}")
    return tuple(words)


def _check_text_alone(given: dict[str, Any], faults: list[str]) -> None:
    if "prompt" not in given:
        faults.append("no wav; a row about text alone has a prompt instead")
    elif of_sound := [name for name in (*OF_SOUND, *(t.name for t in _LABELLED)) if name in given]:
        faults.append(f"{', '.join(of_sound)} speaks of a sound, and the row has no wav")


def _unwrap(given: dict[str, Any], faults: list[str]) -> None:
    """Bring a raw row to the plain form: labels, words and reply out of ``txt`` into fields of their own."""
    for name, theirs in (("prompt", "question"), ("thought", "think_str")):
        value = given.get("extra", {}).get(theirs)
        if isinstance(value, str) and value.strip() and not _unwritable(value):
            given.setdefault(name, value)
    for name in ("lang", "speaker", *(task.name for task in _LABELLED)):
        if (value := given.get(name)) is not None:
            value = value.strip("<> ")
            other_names = _COUNTRIES if name == "lang" else SYNONYMS.get(name, {})
            given[name] = value if name == "speaker" else other_names.get(value.lower(), value.lower())
            if value.lower() in ("none", ""):
                del given[name]
    try:
        tasks = _tasks(given["task"])
    except ValueError as error:
        faults.append(f"{error}{closest(given['task'], list(TASKS))}")
        return
    if "txt" not in given:
        return
    found: dict[str, str] = {}
    if tasks[0].labels:
        marks = _MARK.findall(given["txt"])
        if len(marks) != len(tasks):
            wanted = "".join(f"<{task.name}>" for task in tasks)
            faults.append(f"txt of task {given['task']} must hold {wanted} and no other mark: {given['txt']!r:.60}")
            return
        for task, mark in zip(tasks, marks, strict=True):
            name = STYLE_NAMES.get(mark, mark) if task.name == "style" else mark.lower()
            answer = read(task, f"{task.prefix}<{name}>")  # the prefix lets other names of labels in
            if answer.label is None:
                faults.append(f"txt: {answer.fault}{closest(mark, list(task.labels))}")
            else:
                found[task.name] = answer.label
        given["txt"] = _MARK.sub("", given["txt"])
    else:
        answer = read(tasks[0], given["txt"])
        if answer.fault:
            faults.append(f"txt: {answer.fault}")
        if tasks[0].name == "asr" and _MARK.search(given["txt"]):
            faults.append(f"txt of a task without labels holds marks: {given['txt']!r:.60}")
        given["txt"] = answer.text or ""
        if answer.words:
            given["words"] = [list(word) for word in answer.words]
        if answer.reply:
            given["reply"] = answer.reply
    for name, label in found.items():
        if given.setdefault(name, label) != label:
            faults.append(f"txt says <{label}>, the field {name} says {given[name]!r}")


def _tasks(name: str) -> list[Task]:
    """Return the task that a raw row names, or the tasks of a combination: ``<TRANSCRIBE> <AGE> <GENDER>``."""
    task = get_task(name)
    return [*task.choices] or [task]
