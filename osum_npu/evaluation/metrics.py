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
from osum_npu.tasks import COMBINATIONS, Answer, Task, Utterance, missing

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


_ACCURACY = (Metric("accuracy", "accuracy", "%", False),)


def _combined_metrics(task: Task) -> tuple[Metric, ...]:
    parts = (Metric(f"{part.name}_accuracy", f"{part.name} accuracy", "%", False) for part in task.parts)
    return *_ACCURACY, *parts


HEADLINE: dict[str, tuple[Metric, ...]] = {
    "asr": (Metric("wer", "WER", "%", True), Metric("cer", "CER", "%", True)),
    "timestamps": (Metric("aas_ms", "AAS", "ms", True),),
    "event": _ACCURACY,
    "emotion": _ACCURACY,
    "style": _ACCURACY,
    "gender": _ACCURACY,
    "age": _ACCURACY,
    "chat": (Metric("answer_accuracy", "answer accuracy", "%", False),),
    **{name: _combined_metrics(task) for name, task in COMBINATIONS.items()},
}
"""What the table shows of each task, by task name."""


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
        * chat: ``answer_accuracy``, ``answer_accuracy_interval``: replies equal to the reference after normalisation.
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
    elif task.name == "chat":
        scores |= _chat_scores(scored)
    scores |= _transcript_scores(scored if task.transcript else ())
    if task.name == "asr":
        scores |= _error_rate("release_wer", scored, lambda text, _: release_tokens(text))
    return scores


def _has_label(task: Task, utterance: Utterance) -> bool:
    return not missing(task, utterance) and all(utterance.labels[c.name] in c.labels for c in task.choices)


def _transcript_scores(pairs: Iterable[Pair]) -> dict[str, Any]:
    words: list[Pair] = []
    characters: list[Pair] = []
    for pair in pairs:
        if pair[0].text is not None:
            (characters if is_chinese(pair[0].language) else words).append(pair)
    return _error_rate("wer", words, tokens) | _error_rate("cer", characters, tokens)


def _error_rate(name: str, pairs: Sequence[Pair], split: Callable[[str, str], list[str]]) -> dict[str, Any]:
    edits = []
    for utterance, answer in pairs:
        lang = utterance.language
        said = None if answer is None or answer.text is None else split(answer.text, lang)
        edits.append(edit_counts(split(utterance.text or "", lang), said))
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
    names = [part.name for part in task.parts]
    right = sum(
        all((answer.labels or {}).get(name) == utterance.labels[name] for name in names)
        for utterance, answer in pairs
        if answer is not None
    )
    scores: dict[str, Any] = {
        "accuracy": right / len(pairs) if pairs else None,
        "accuracy_interval": wilson_interval(right, len(pairs)),
    }
    for part in task.parts:
        alone = [(u, answer and replace(answer, label=(answer.labels or {}).get(part.name))) for u, answer in pairs]
        scores |= {f"{part.name}_{key}": value for key, value in _label_scores(part, alone).items()}
    return scores


def _timestamp_scores(pairs: Sequence[Pair]) -> dict[str, Any]:
    shifts = [
        time_shift(utterance.words or (), (answer.words if answer is not None else None) or (), utterance.language)
        for utterance, answer in pairs
    ]
    total = sum(shifts, TimeShift())
    return {
        "aas_ms": total.average_ms,
        "aas_ms_interval": bootstrap_interval([s.total_ms for s in shifts], [s.matched for s in shifts]),
        "matched": total.matched_share,
    }


def _chat_scores(pairs: Sequence[Pair]) -> dict[str, Any]:
    right = 0
    for utterance, answer in pairs:
        if answer is not None and answer.reply is not None:
            lang = utterance.language
            right += tokens(answer.reply, lang) == tokens(utterance.reply or "", lang)
    return {
        "answer_accuracy": right / len(pairs) if pairs else None,
        "answer_accuracy_interval": wilson_interval(right, len(pairs)),
    }
