"""Whether a model does what it is asked: instruction following, and what natural wording costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from osum_npu.evaluation.confidence import bootstrap_difference, wilson_interval
from osum_npu.evaluation.metrics import Metric, Pair, all_right, edits_of, headline, of_part, replied, shift_of
from osum_npu.evaluation.text import is_chinese
from osum_npu.tasks import Task, get_task
from osum_npu.tasks.form import Form

Wording = Literal["fixed", "natural"]
"""``fixed`` is the first wording of a task, or what a row asks by itself where nothing is compared; ``natural`` is made
up: :mod:`osum_npu.tasks.instructions`."""


def measure(answers: Mapping[Wording, Mapping[str, Sequence[Pair]]], form: Form) -> dict[str, Any]:
    """Measure how the model follows instructions, by wording, and what the wording changes.

    Args:
        answers: pairs by wording and name of the task. Natural ones are of the same utterances as the fixed ones.
        form: of the model: what it is shown, and whether its answers begin with the tags of the task.

    Returns:
        ``following`` by wording, if answers have tags, for the tasks whose instruction the model is shown, and
        ``differences`` by task, if there are natural ones; see :func:`following` and :func:`compare`.
    """
    found: dict[str, Any] = {}
    if form.prefix:
        found["following"] = {
            wording: following({name: pairs for name, pairs in by_task.items() if get_task(name).kind in form.prompt})
            for wording, by_task in answers.items()
        }
    if "natural" in answers:
        compared = {
            name: compare(get_task(name), answers["fixed"][name], pairs) for name, pairs in answers["natural"].items()
        }
        found["differences"] = {name: metrics for name, metrics in compared.items() if metrics}
    return found


def read_following(path: Path) -> dict[str, Any]:
    """Return how instructions were followed in all, by wording, from the ``report.json`` of another evaluation.

    Raises:
        ValueError: it cannot be read, or tells nothing about instructions.
    """
    try:
        by_wording = json.loads(path.read_text("utf-8"))["instructions"]["following"]
        return {wording: found["all"] for wording, found in by_wording.items()}
    except OSError as error:
        raise ValueError(f"{path}: the report of a stage cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: this report tells nothing about instructions; `osum-npu eval` writes one that does for a model "
            "whose answers begin with tags"
        ) from error


def following(answers: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    """Count answers that begin with the tags of the task that was asked for (OSUM-Pangu's IFR).

    Args:
        answers: pairs by the name of the task that was asked. An answer of ``None`` follows nothing.

    Returns:
        ``all`` and ``tasks`` by name, each with ``n``, ``followed``, ``rate`` and ``interval`` (Wilson). Tasks about
        text alone are left out.
    """
    heard = {name: pairs for name, pairs in answers.items() if get_task(name).hears and pairs}
    counts = {
        name: (sum(answer is not None and answer.intent == name for _, answer in pairs), len(pairs))
        for name, pairs in heard.items()
    }
    in_all = (sum(followed for followed, _ in counts.values()), sum(n for _, n in counts.values()))
    return {"all": _rate(*in_all), "tasks": {name: _rate(*count) for name, count in counts.items()}}


def _rate(followed: int, n: int) -> dict[str, Any]:
    return {
        "n": n,
        "followed": followed,
        "rate": followed / n if n else None,
        "interval": wilson_interval(followed, n),
    }


def compare(task: Task, fixed: Sequence[Pair], natural: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """Compare the answers of the same utterances to both wordings.

    Args:
        task: what was asked.
        fixed: utterances with the answers to the fixed wording.
        natural: the same utterances in the same order, with those to natural wording.

    Returns:
        By the key of each of the task's headline metrics that is defined: ``fixed`` and ``natural`` (the metric),
        ``difference`` (natural less fixed) and ``interval`` (95 %, bootstrap over utterances, paired).
    """
    found = {}
    for metric in headline(task):
        tallies = [_tallies(task, metric, pairs) for pairs in (fixed, natural)]
        if (difference := bootstrap_difference(*tallies)) is not None:
            one, other = (sum(n for n, _ in side) / sum(d for _, d in side) for side in tallies)
            found[metric.key] = {"fixed": one, "natural": other, "difference": difference[0], "interval": difference[1]}
    return found


def _tallies(task: Task, metric: Metric, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """Return numerator and denominator of a metric for each utterance; nothing over nothing where it does not count."""
    if metric.key in ("wer", "cer"):
        counted = [
            (pair, pair[0].text is not None and is_chinese(pair[0].language) == (metric.key == "cer")) for pair in pairs
        ]
        edits = [edits_of(pair) if counts else None for pair, counts in counted]
        return [(edit.errors, edit.reference) if edit else (0, 0) for edit in edits]
    if metric.key == "aas_ms":
        return [(shift.total_ms, shift.matched) for shift in map(shift_of, pairs)]
    if metric.key in ("answer_accuracy", "answer_contained"):
        return [(replied(pair)[metric.key == "answer_contained"], 1) for pair in pairs]
    if metric.key == "accuracy" and task.parts:
        return [(all_right(task, pair), 1) for pair in pairs]
    parts = {f"{part.name}_accuracy": part for part in task.parts}
    part = parts.get(metric.key, task)
    right = of_part(part, pairs) if part is not task else pairs
    return [(answer is not None and answer.label == u.labels[part.name], 1) for u, answer in right]
