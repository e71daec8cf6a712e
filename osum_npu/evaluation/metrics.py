"""The scores of each task, ready for JSON: rates as fractions, undefined ones as ``None``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np

from osum_npu.evaluation.confidence import bootstrap_interval, wilson_interval
from osum_npu.evaluation.error_rate import EditCounts, edit_counts
from osum_npu.evaluation.text import is_chinese, release_tokens, tokens
from osum_npu.evaluation.timestamps import TimeShift, time_shift
from osum_npu.tasks import Answer, Task, Utterance, missing

Pair = tuple[Utterance, Answer | None]
"""A labelled recording and what the model said of it; ``None`` where the recording could not be processed."""

NONE = "(none)"
"""The last column of a confusion matrix: no answer, or none that is a label."""


class Metric(NamedTuple):
    """One number of a task that a table shows; its interval is under ``<key>_interval``."""

    key: str
    name: str
    unit: str
    """``%`` for a fraction, shown times 100; ``ms``."""
    lower_is_better: bool


def headline(task: Task) -> tuple[Metric, ...]:
    """Return what the table shows of a task."""
    if task.name == "asr":
        return Metric("wer", "WER", "%", True), Metric("cer", "CER", "%", True)
    if task.name == "timestamps":
        return (Metric("aas_ms", "AAS", "ms", True),)
    if task.kind == "intent":
        return (Metric("intent_accuracy", "intent accuracy", "%", False),)
    if task.kind != "text":
        answers, contains = Metric("answer_accuracy", "answer accuracy", "%", False), "answer contained"
        return answers, Metric("answer_contained", contains, "%", False)
    parts = (Metric(f"{part.name}_accuracy", f"{part.name} accuracy", "%", False) for part in task.parts)
    return Metric("accuracy", "accuracy", "%", False), *parts


def score(task: Task, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Score the answers to one task.

    An answer of ``None`` is an error, not a gap: its words count as deleted and its label as wrong.

    Args:
        task: what was asked.
        pairs: utterances with their answers. An utterance without the label that the task needs is not scored.

    Returns:
        For every task ``n`` (scored utterances), ``unlabelled`` (left out), ``failed`` (no answer), ``unreadable``
        (answers with a fault), ``seconds`` (of sound; ``None`` where a duration is unknown), and of the utterances with
        a transcript ``wer`` (those not in Chinese) and ``cer`` (those in Chinese) with ``_interval`` and ``_counts``;
        of none where the task asks for no transcript.
        Besides, by task:

        * asr: ``release_wer``, by the rules of the OSUM release's scorer over all languages together.
        * tasks with labels: ``accuracy``, ``accuracy_interval``, ``classes`` (``n`` and ``accuracy`` of each) and
          ``confusion``: a row for each of its ``labels``, a column for each and one for :data:`NONE`.
        * combinations: ``accuracy`` and ``accuracy_interval`` of all labels at once, and what a task with labels has
          for each part, under ``<part>_accuracy`` and so on.
        * timestamps: ``aas_ms``, ``aas_ms_interval``, ``matched`` (share of reference words that it speaks for).
        * chat, thinking and text to text: ``answer_accuracy``, replies equal to the reference after normalisation, and
          ``answer_contained``, replies that have all of it in a row, each with ``_interval``.
        * intent: ``intent_accuracy`` and ``intent_accuracy_interval``: answers that are the prefix of the right task.
    """
    scored = [(utterance, answer) for utterance, answer in pairs if _has_label(task, utterance)]
    durations = [utterance.duration for utterance, _ in scored]
    scores: dict[str, Any] = {
        "n": len(scored),
        "unlabelled": len(pairs) - len(scored),
        "failed": sum(answer is None for _, answer in scored),
        "unreadable": sum(answer is not None and answer.fault is not None for _, answer in scored),
        "seconds": None if None in durations else float(sum(filter(None, durations))),
    }
    if task.labels:
        scores |= _label_scores(task, scored)
    elif task.parts:
        scores |= _combined_scores(task, scored)
    elif task.name == "timestamps":
        scores |= _timestamp_scores(scored)
    elif task.kind == "intent":
        scores |= _share("intent_accuracy", [named_task(pair) for pair in scored])
    elif task.kind != "text":
        scores |= _share("answer_accuracy", [replied(pair)[0] for pair in scored])
        scores |= _share("answer_contained", [replied(pair)[1] for pair in scored])
    scores |= _transcript_scores(scored if task.transcript else ())
    if task.name == "asr":
        scores |= _error_rate("release_wer", scored, lambda text, _: release_tokens(text))
    return scores


def _has_label(task: Task, utterance: Utterance) -> bool:
    return not missing(task, utterance) and all(utterance.labels[c.name] in c.labels for c in task.choices)


def edits_of(pair: Pair, split: Callable[[str, str], list[str]] = tokens) -> EditCounts:
    """Count what one transcript gets wrong, in the units that ``split`` makes; no answer is all deleted."""
    utterance, answer = pair
    lang = utterance.language
    said = None if answer is None or answer.text is None else split(answer.text, lang)
    return edit_counts(split(utterance.text or "", lang), said)


def shift_of(pair: Pair) -> TimeShift:
    """Measure how far one answer's word times are off."""
    utterance, answer = pair
    said = (answer.words if answer is not None else None) or ()
    return time_shift(utterance.words or (), said, utterance.language)


def all_right(task: Task, pair: Pair) -> bool:
    """Say whether one answer has all the labels that a combination asks for right."""
    utterance, answer = pair
    labels = (answer.labels if answer is not None else None) or {}
    return all(labels.get(part.name) == utterance.labels[part.name] for part in task.parts)


def replied(pair: Pair) -> tuple[bool, bool]:
    """Say whether one reply equals its reference, and whether it has all of it in a row, after normalisation."""
    utterance, answer = pair
    if answer is None or answer.reply is None:
        return False, False
    said, wanted = (tokens(reply, utterance.language) for reply in (answer.reply, utterance.reply or ""))
    runs = (said[i : i + len(wanted)] for i in range(len(said) - len(wanted) + 1))
    return said == wanted, said == wanted or (bool(wanted) and wanted in runs)


def named_task(pair: Pair) -> bool:
    """Say whether the answer to a written instruction is the prefix of the task that it asks for."""
    utterance, answer = pair
    return answer is not None and answer.fault is None and answer.intent == utterance.intent


def _share(name: str, right: Sequence[bool]) -> dict[str, Any]:
    return {
        name: sum(right) / len(right) if right else None,
        f"{name}_interval": wilson_interval(sum(right), len(right)),
    }


def _transcript_scores(pairs: Iterable[Pair]) -> dict[str, Any]:
    words: list[Pair] = []
    characters: list[Pair] = []
    for pair in pairs:
        if pair[0].text is not None:
            (characters if is_chinese(pair[0].language) else words).append(pair)
    return _error_rate("wer", words, tokens) | _error_rate("cer", characters, tokens)


def _error_rate(name: str, pairs: Sequence[Pair], split: Callable[[str, str], list[str]]) -> dict[str, Any]:
    edits = [edits_of(pair, split) for pair in pairs]
    total = sum(edits, EditCounts())
    return {
        name: total.rate,
        f"{name}_interval": bootstrap_interval([e.errors for e in edits], [e.reference for e in edits]),
        f"{name}_counts": {"utterances": len(edits), "reference": total.reference} | asdict(total),
    }


def _label_scores(task: Task, pairs: Sequence[Pair]) -> dict[str, Any]:
    column = {label: i for i, label in enumerate(task.labels)}
    none = len(column)
    matrix = np.zeros((none, none + 1), dtype=int)
    for utterance, answer in pairs:
        said = answer.label if answer is not None else None
        matrix[column[utterance.labels[task.name]], none if said is None else column.get(said, none)] += 1
    correct, n = matrix.diagonal().tolist(), matrix.sum(axis=1).tolist()
    return {
        "accuracy": sum(correct) / sum(n) if sum(n) else None,
        "accuracy_interval": wilson_interval(sum(correct), sum(n)),
        "classes": {
            label: {"n": total, "accuracy": right / total if total else None}
            for label, right, total in zip(task.labels, correct, n, strict=True)
        },
        "confusion": {"labels": list(task.labels), "matrix": matrix.tolist()},
    }


def _combined_scores(task: Task, pairs: Sequence[Pair]) -> dict[str, Any]:
    scores = _share("accuracy", [all_right(task, pair) for pair in pairs])
    for part in task.parts:
        scores |= {f"{part.name}_{key}": value for key, value in _label_scores(part, of_part(part, pairs)).items()}
    return scores


def of_part(part: Task, pairs: Iterable[Pair]) -> list[Pair]:
    """Take the label of one part out of the answers to a combination."""
    return [(u, answer and replace(answer, label=(answer.labels or {}).get(part.name))) for u, answer in pairs]


def _timestamp_scores(pairs: Sequence[Pair]) -> dict[str, Any]:
    shifts = [shift_of(pair) for pair in pairs]
    total = sum(shifts, TimeShift())
    return {
        "aas_ms": total.average_ms,
        "aas_ms_interval": bootstrap_interval([s.total_ms for s in shifts], [s.matched for s in shifts]),
        "matched": total.matched_share,
    }
