"""The answer of a task as text, and that text read back into typed fields.

Training writes what :func:`read` later reads, so the two live side by side::

    asr         hello world
    timestamps  <0.10>hello<0.46><0.52>world<0.98>
    gender      hello world<male>          (any task with labels; the text may be absent)
    age+gender  hello world<adult><male>   (<adult><male> where the task asks for no transcript)
    chat        who are you<开始回答>a small model
    chat_think  <think>a question about me<think end>a small model
    intent      <asr><age>                 (the prefix of the task that an instruction asks for)

With prefix, as OSUM-Pangu answers, the tags of the task stand before it and labels are upper-case::

    age         <asr><age>hello world<ADULT>
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from osum_npu.tasks.task import CHAT_SEPARATOR, PREFIXES, SYNONYMS, TASKS, Task, get_task
from osum_npu.tasks.text import join_words, normalize_text
from osum_npu.tasks.utterance import Utterance, Word

STAMP_SECONDS = 0.02
"""Resolution of written word times. The release writes 0.1 s or finer."""

THINK, THINK_END = "<think>", "<think end>"
"""Stand around the thought before a reply (ASLP-lab/OSUM-EChat and OSUM-Pangu, their data pipelines)."""

_MARK = re.compile(r"<([^<>]*)>")
_STAMPED = re.compile(r"<(\d{1,6}(?:\.\d+)?)>([^<>]+)<(\d{1,6}(?:\.\d+)?)>")  # six digits hold a week
_TAG_OF_PREFIX = {prefix: tag for tag, prefix in PREFIXES.items()}
_PREFIX = re.compile(rf"(?:<(?:{'|'.join(_TAG_OF_PREFIX)})>)+", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said about one recording. A field that the task does not ask for is ``None``."""

    text: str | None = None
    label: str | None = None
    labels: Mapping[str, str] | None = None
    """Of a combination: those that could be read, by the name of their task."""
    words: tuple[Word, ...] | None = None
    thought: str | None = None
    reply: str | None = None
    intent: str | None = None
    """Name of the task that the answer's prefix names: what the model took the instruction for."""
    fault: str | None = None
    """Why the text could not be read as this task's answer, in words; the other fields hold what could be."""


def missing(task: Task, utterance: Utterance) -> str:
    """Say what ``utterance`` lacks to serve as an example of ``task``; empty where it lacks nothing."""
    if not task.hears:
        return _missing_in_text(task, utterance)
    if not utterance.wav:
        return "no sound"
    if utterance.intent not in (None, task.name):
        return f"its instruction asks for {utterance.intent}"
    if absent := [choice.name for choice in task.choices if choice.name not in utterance.labels]:
        return f"no {' and no '.join(absent)} label"
    if not utterance.text and task.transcript and not task.labels:  # a single label needs none
        return "no transcript"
    if task.name == "timestamps" and not utterance.words:
        return "no word times"
    if task.kind == "chat_think" and not utterance.thought:
        return "no thought"
    if task.kind in ("chat", "chat_think") and not utterance.reply:
        return "no reply"
    return ""


def _missing_in_text(task: Task, utterance: Utterance) -> str:
    if utterance.wav:
        return "a recording, and the task is about text alone"
    if not utterance.prompt:
        return "no prompt"
    if task.kind == "intent":
        return "" if utterance.intent else "no intent"
    if utterance.intent:
        return f"its instruction asks for {utterance.intent}"
    return "" if utterance.reply else "no reply"


def marks(*, prefix: bool = False) -> list[str]:
    """List what answers hold besides words and times: labels and separators; with ``prefix`` the tags, too."""
    labels = [f"<{label}>" for task in TASKS.values() for label in task.labels]
    if prefix:
        labels = [*(label.upper() for label in labels), *(f"<{tag}>" for tag in _TAG_OF_PREFIX), THINK, THINK_END]
    return [*dict.fromkeys(labels), CHAT_SEPARATOR]


def stamp(seconds: float, resolution: float = STAMP_SECONDS) -> str:
    """Write one time, rounded to ``resolution``: ``<1.24>``, or ``<1.2>`` at 0.1 s."""
    return f"<{round(seconds / resolution) * resolution:.{1 if resolution >= 0.1 else 2}f}>"


def write(task: Task, utterance: Utterance, resolution: float = STAMP_SECONDS, *, prefix: bool = False) -> str:
    """Write the answer that ``task`` expects for ``utterance``.

    Args:
        task: what is asked.
        utterance: the labelled recording.
        resolution: step of written times in seconds.
        prefix: begin with the tags of the task and write labels in upper case, as OSUM-Pangu does. Transcripts then
            keep their case, unless nothing else is asked for (its ``process_text2``).

    Raises:
        ValueError: the utterance lacks a label that the task needs.
    """
    if lack := missing(task, utterance):
        raise ValueError(f"utterance {utterance.key!r} cannot be an example of task {task.name!r}: {lack}")
    if task.kind == "intent":
        return get_task(utterance.intent or "").prefix
    lower = not prefix or task.name == "asr"
    text = normalize_text(utterance.text or "", lower=lower).strip() if task.transcript else ""
    if task.name == "timestamps":
        spans = ((stamp(w.start, resolution), w.text, stamp(w.end, resolution)) for w in utterance.words or ())
        text = "".join(f"{start}{normalize_text(word, lower=lower)}{end}" for start, word, end in spans)
    elif task.kind == "chat_think":
        text = f"{THINK}{utterance.thought}{THINK_END}{utterance.reply}"
    elif task.kind in ("chat", "text2text"):
        text = f"{text}{CHAT_SEPARATOR}{utterance.reply}" if task.transcript else utterance.reply or ""
    labels = "".join(f"<{utterance.labels[choice.name]}>" for choice in task.choices)
    return f"{task.prefix}{text}{labels.upper()}" if prefix else text + labels


def spell(utterance: Utterance) -> str:
    """Write all that an encoder alone can be taught: the transcript and every label, ``hello<happy><male>``.

    OSUM's first stage trains Whisper on such tagged transcripts.
    """
    marks = [f"<{utterance.labels[name]}>" for name in TASKS if name in utterance.labels]
    return normalize_text((utterance.text or "") + "".join(marks)).strip()


def read(task: Task, text: str) -> Answer:
    """Read a model's output for ``task`` back into fields, with or without the prefix of OSUM-Pangu.

    Without a prefix, transcripts are taken in lower case; labels are known in any case. Never raises: what is wrong is
    named in ``fault``.
    """
    prefix, rest = _split_prefix(text)
    if not prefix and task.kind != "intent":
        return _read_fields(task, text, lower=task.kind in ("text", "chat"))
    named = _task_of_prefix(prefix)
    if task.kind == "intent":
        fault = f"{rest!r} stands behind the tags" if named and rest else None if named else _no_task(text)
        return Answer(intent=named.name if named else None, fault=fault)
    answer = _read_fields(task, rest, lower=False)
    if task.prefix == prefix:
        return replace(answer, intent=task.name)
    fault = f"its tags {prefix} are not those of task {task.name!r}: {task.prefix or 'none'}"
    return replace(answer, intent=named.name if named else None, fault="; ".join(filter(None, (fault, answer.fault))))


def read_prefixed(text: str) -> tuple[Task | None, Answer]:
    """Read an answer with prefix without knowing what was asked: the prefix tells the task, the task the fields.

    Never raises. Without a prefix, or with tags of no task, there is ``None`` for the task, and the answer holds the
    text without marks and a ``fault``.
    """
    task = _task_of_prefix(_split_prefix(text)[0])
    if task is None:
        return None, Answer(text=_plain(normalize_text(text, lower=False)), fault=_no_task(text))
    return task, read(task, text)


def _split_prefix(text: str) -> tuple[str, str]:
    """Return the tags at the beginning, in lower case, and what follows; no tags and all of it where there are none."""
    text = normalize_text(text, lower=False).strip()
    found = _PREFIX.match(text)
    return (found[0].lower(), text[found.end() :]) if found else ("", text)


def _task_of_prefix(prefix: str) -> Task | None:
    tags = [f"<{_TAG_OF_PREFIX[name]}>" for name in _MARK.findall(prefix)]
    try:
        return get_task("".join(tags))
    except ValueError:
        return None


def _no_task(text: str) -> str:
    return f"no tags of a task at the beginning of {text!r:.60}"


def _read_fields(task: Task, text: str, *, lower: bool) -> Answer:
    """Read an answer behind its prefix; other names of labels are taken where the case is kept, as OSUM-Pangu does."""
    if task.kind == "text2text":
        return Answer(reply=text.strip())
    text = normalize_text(text, lower=lower).strip()
    if task.name == "timestamps":
        return _read_timestamps(text)
    if task.kind == "chat_think":
        thought, end, reply = text.partition(THINK_END)
        if not end:
            return Answer(reply=text, fault=f"no {THINK_END} in {text!r}")
        return Answer(thought=thought.removeprefix(THINK).strip(), reply=reply.strip())
    if task.kind == "chat":
        if not task.transcript:
            return Answer(reply=text)
        said, separator, reply = text.partition(CHAT_SEPARATOR)
        fault = None if separator else f"no {CHAT_SEPARATOR} in {text!r}"
        return Answer(text=_plain(said), reply=reply.strip() if separator else None, fault=fault)
    transcript = _plain(text) if task.transcript else None
    if not task.choices:
        return Answer(text=transcript)
    labels, faults = _read_labels(task, text, other_names={} if lower else SYNONYMS)
    fault = "; ".join(faults) or None
    if task.parts:
        return Answer(text=transcript, labels=labels, fault=fault)
    return Answer(text=transcript, label=labels.get(task.name), fault=fault)


def _read_labels(
    task: Task, text: str, other_names: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, str], list[str]]:
    """Take the first mark for the label of the first choice, and so on; case does not matter."""
    marks = _MARK.findall(text)
    if not marks:
        return {}, [f"no label in {text!r}"]
    labels, faults = {}, []
    for choice, mark in itertools.zip_longest(task.choices, marks[: len(task.choices)]):
        by_spelling = {label.lower(): label for label in choice.labels} | {**other_names.get(choice.name, {})}
        if mark is None:
            faults.append(f"no {choice.name} label in {text!r}")
        elif (label := by_spelling.get(mark.strip().lower())) is None:
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
