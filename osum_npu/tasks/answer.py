"""The answer of a task as text, and that text read back into typed fields.

Training writes what :func:`read` later reads, so the two live side by side::

    asr         hello world
    timestamps  <0.10>hello<0.46><0.52>world<0.98>
    gender      hello world<male>          (any task with labels; the text may be absent)
    age+gender  hello world<adult><male>   (<adult><male> where the task asks for no transcript)
    chat        who are you<开始回答>a small model
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from osum_npu.tasks.task import CHAT_SEPARATOR, TASKS, Task
from osum_npu.tasks.text import join_words, normalize_text
from osum_npu.tasks.utterance import Utterance, Word

STAMP_SECONDS = 0.02
"""Resolution of written word times. The release writes 0.1 s or finer."""

_MARK = re.compile(r"<([^<>]*)>")
_STAMPED = re.compile(r"<(\d{1,6}(?:\.\d+)?)>([^<>]+)<(\d{1,6}(?:\.\d+)?)>")  # six digits hold a week


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said about one recording. A field that the task does not ask for is ``None``."""

    text: str | None = None
    label: str | None = None
    labels: Mapping[str, str] | None = None
    """Of a combination: those that could be read, by the name of their task."""
    words: tuple[Word, ...] | None = None
    reply: str | None = None
    fault: str | None = None
    """Why the text could not be read as this task's answer, in words; the other fields hold what could be."""


def missing(task: Task, utterance: Utterance) -> str:
    """Say what ``utterance`` lacks to serve as an example of ``task``; empty where it lacks nothing."""
    if absent := [choice.name for choice in task.choices if choice.name not in utterance.labels]:
        return f"no {' and no '.join(absent)} label"
    if not utterance.text and task.transcript and not task.labels:  # a single label needs none
        return "no transcript"
    if task.name == "timestamps" and not utterance.words:
        return "no word times"
    if task.name == "chat" and not utterance.reply:
        return "no reply"
    return ""


def stamp(seconds: float, resolution: float = STAMP_SECONDS) -> str:
    """Write one time, rounded to ``resolution``: ``<1.24>``, or ``<1.2>`` at 0.1 s."""
    return f"<{round(seconds / resolution) * resolution:.{1 if resolution >= 0.1 else 2}f}>"


def write(task: Task, utterance: Utterance, resolution: float = STAMP_SECONDS) -> str:
    """Write the answer that ``task`` expects for ``utterance``.

    Args:
        task: what is asked.
        utterance: the labelled recording.
        resolution: step of written times in seconds.

    Raises:
        ValueError: the utterance lacks a label that the task needs.
    """
    if lack := missing(task, utterance):
        raise ValueError(f"utterance {utterance.key!r} cannot be an example of task {task.name!r}: {lack}")
    text = normalize_text(utterance.text or "").strip() if task.transcript else ""
    if task.name == "timestamps":
        return "".join(f"{stamp(w.start, resolution)}{w.text}{stamp(w.end, resolution)}" for w in utterance.words or ())
    if task.name == "chat":
        return f"{text}{CHAT_SEPARATOR}{utterance.reply}"
    return text + "".join(f"<{utterance.labels[choice.name]}>" for choice in task.choices)


def spell(utterance: Utterance) -> str:
    """Write all that an encoder alone can be taught: the transcript and every label, ``hello<happy><male>``.

    OSUM's first stage trains Whisper on such tagged transcripts.
    """
    marks = [f"<{utterance.labels[name]}>" for name in TASKS if name in utterance.labels]
    return normalize_text((utterance.text or "") + "".join(marks)).strip()


def read(task: Task, text: str) -> Answer:
    """Read a model's output for ``task`` back into fields. Never raises: what is wrong is named in ``fault``."""
    text = normalize_text(text).strip()
    if task.name == "timestamps":
        return _read_timestamps(text)
    if task.name == "chat":
        said, separator, reply = text.partition(CHAT_SEPARATOR)
        fault = None if separator else f"no {CHAT_SEPARATOR} in {text!r}"
        return Answer(text=_plain(said), reply=reply.strip() if separator else None, fault=fault)
    transcript = _plain(text) if task.transcript else None
    if not task.choices:
        return Answer(text=transcript)
    labels, faults = _read_labels(task, text)
    fault = "; ".join(faults) or None
    if task.parts:
        return Answer(text=transcript, labels=labels, fault=fault)
    return Answer(text=transcript, label=labels.get(task.name), fault=fault)


def _read_labels(task: Task, text: str) -> tuple[dict[str, str], list[str]]:
    """Take the first mark for the label of the first choice, and so on; case does not matter."""
    marks = _MARK.findall(text)
    if not marks:
        return {}, [f"no label in {text!r}"]
    labels, faults = {}, []
    for choice, mark in itertools.zip_longest(task.choices, marks[: len(task.choices)]):
        by_spelling = {label.lower(): label for label in choice.labels}
        if mark is None:
            faults.append(f"no {choice.name} label in {text!r}")
        elif (label := by_spelling.get(mark.strip())) is None:
            faults.append(f"<{mark}> is no label of task {choice.name!r}: {', '.join(choice.labels)}")
        else:
            labels[choice.name] = label
    return labels, faults


def _plain(text: str) -> str:
    """Remove all ``<marks>``."""
    return _MARK.sub("", text).strip()


def _read_timestamps(text: str) -> Answer:
    words, rest = [], []
    position = 0
    for match in _STAMPED.finditer(text):
        rest.append(text[position : match.start()])
        position = match.end()
        start, end = float(match.group(1)), float(match.group(3))
        words.append(Word(match.group(2).strip(), start, end))
    rest.append(text[position:])
    fault = None
    if left := "".join(rest).strip():
        fault = f"{left!r} stands outside <start>word<end>"
    elif any(w.end < w.start for w in words) or any(a.start > b.start for a, b in itertools.pairwise(words)):
        fault = "times run backwards"
    said = join_words([w.text for w in words]) if words else _plain(text)
    return Answer(text=said, words=tuple(words), fault=fault)
