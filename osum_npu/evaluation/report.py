"""Scores, curves and examples as one page for people and one JSON file for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from osum_npu.evaluation.difference import differences
from osum_npu.evaluation.figures import learning_curves, rate_bars, spectrogram, stage_names
from osum_npu.evaluation.metrics import NONE, Metric, headline
from osum_npu.tasks import LISTED, Word, get_task

FRAMES_PER_SECOND = 100
SKIPPED_SHOWN = 200
"""Skipped files named on the page; ``report.json`` names all."""
_PIXELS_PER_SECOND = 140
"""Least width of a spectrogram that carries words, so that a short word still fits."""
_TICKS = 8


@dataclass(frozen=True)
class Example:
    """One recording to show."""

    key: str
    task: str
    wav: str
    reference: str
    """As :func:`osum_npu.tasks.write` writes it."""
    hypothesis: str
    """What the model answered; empty where nothing came back."""
    mel: npt.NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    """``[frames, n_mels]`` in frames of 10 ms."""
    words: tuple[Word, ...] | None = None
    """Drawn over the spectrogram in the timestamps task."""


@dataclass(frozen=True)
class Row:
    """One line of the task table, as text."""

    task: str
    metric: str
    value: str
    interval: str
    n: str
    unreadable: str
    failed: str
    notes: str


HEADINGS = Row("task", "metric", "value", "95 % interval", "n", "unreadable", "failed", "notes")


def table_rows(scores: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Lay out the headline metrics of ``scores`` (by task name, each from :func:`score`) in the order of tasks."""
    return [row for task in _in_order(scores) for row in _task_rows(task, scores[task])]


def format_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the task table for a terminal."""
    return _align([list(vars(row).values()) for row in (HEADINGS, *table_rows(scores))], "<<>>>>><")


def format_instructions(instructions: Mapping[str, Any]) -> str:
    """Write the tables on instructions for a terminal; nothing where there are none."""
    tables = [table for table in (following_table(instructions), difference_table(instructions)) if table]
    return "\n\n".join(_align(table, "<" + ">" * (len(table[0]) - 1)) for table in tables)


def following_table(instructions: Mapping[str, Any]) -> list[list[str]]:
    """Lay out how instructions were followed, by task and wording: a heading, then a line for each task and for all."""
    by_wording = instructions.get("following", {})
    names = list(dict.fromkeys(name for found in by_wording.values() for name in found["tasks"]))
    if not names:
        return []
    heading = (cell for wording in by_wording for cell in ("n", f"{wording} ↑", "95 % interval"))
    table = [["instructions followed", *heading]]
    for name in [*names, "all"]:
        rates = [found["all"] if name == "all" else found["tasks"].get(name, {}) for found in by_wording.values()]
        cells = [(str(rate.get("n", 0)), *_rate_cells(rate.get("rate"), rate.get("interval"), "%")) for rate in rates]
        table.append([name, *(cell for triple in cells for cell in triple)])
    return table


def difference_table(instructions: Mapping[str, Any]) -> list[list[str]]:
    """Lay out what natural wording changes, by task and metric; nothing where it was not measured."""
    differences = instructions.get("differences", {})
    if not differences:
        return []
    table = [["wording", "metric", "fixed", "natural", "natural − fixed", "95 % interval"]]
    for name, metrics in differences.items():
        for metric in headline(get_task(name)):
            if found := metrics.get(metric.key):
                values = [_number(found[wording], metric.unit) for wording in ("fixed", "natural")]
                change = _rate_cells(found["difference"], found["interval"], metric.unit)
                arrow = "↓" if metric.lower_is_better else "↑"
                table.append([name, f"{metric.name} {arrow}", *values, *change])
    return table


def _rate_cells(value: float | None, interval: Sequence[float] | None, unit: str) -> tuple[str, str]:
    bounds = " – ".join(_number(bound, unit) for bound in interval) if interval else "–"
    return f"{_number(value, unit)} {unit}", bounds


def _align(lines: Sequence[Sequence[str]], align: str) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True)).rstrip()
        for line in lines
    )


def write_report(
    out: Path,
    *,
    title: str,
    scores: Mapping[str, dict[str, Any]],
    examples: Sequence[Example],
    curves: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    skipped: Sequence[str],
    instructions: Mapping[str, Any] | None = None,
    earlier: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write ``report.json`` and ``report.html`` into the folder ``out``, each replaced as a whole.

    Args:
        out: folder; made if it is not there.
        title: heading of the page.
        scores: what :func:`osum_npu.evaluation.metrics.score` returned, by task name.
        examples: recordings to show, in this order.
        curves: rows of the training log: ``stage``, ``step`` (counts on over the stages), ``loss``, ``learning_rate``
            and, where there is one, ``ctc_loss``; empty to leave the section out.
        facts: what was evaluated on what, by name: model, data, device, date.
        skipped: recordings that could not be used, each with the reason.
        instructions: what :func:`osum_npu.evaluation.following.measure` returned.
        earlier: of :func:`osum_npu.evaluation.following.read_following`, by the name of the stage.

    Returns:
        The path of ``report.html``: one file that needs no network.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("osum_npu.evaluation").joinpath("report.html.j2").read_text("utf-8"))
    instructions = instructions or {}
    followed = {wording: found["all"] for wording, found in instructions.get("following", {}).items()}
    page = template.render(
        title=title,
        facts=facts,
        headings=HEADINGS,
        rows=table_rows(scores),
        confusions=[one for task in _in_order(scores) for one in _confusions(task, scores[task])],
        instruction_tables=[t for t in (following_table(instructions), difference_table(instructions)) if t],
        followed_by_stage=rate_bars({**(earlier or {}), "this model": followed}) if followed else "",
        curves=learning_curves(curves),
        stages=stage_names(curves),
        examples=[_example(example) for example in examples],
        skipped=skipped[:SKIPPED_SHOWN],
        skipped_count=len(skipped),
    )
    data = {"tasks": scores, "facts": dict(facts), "skipped": list(skipped)}
    if instructions:
        data["instructions"] = instructions
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "report.json", json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n")
    return _write(out / "report.html", page)


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
    return path


def _in_order(scores: Mapping[str, Any]) -> list[str]:
    return [task for task in dict.fromkeys((*LISTED, *scores)) if task in scores]


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" if unit == "%" else f"{value:.1f}"


def _task_rows(task: str, scores: Mapping[str, Any]) -> Iterator[Row]:
    """Yield a row for each headline metric that is defined, or one of dashes; the task is named on its first."""
    shown = headline(get_task(task))
    defined = [metric for metric in shown if scores[metric.key] is not None] or shown[:1]
    for metric in defined:
        first = metric is defined[0]
        interval = scores[f"{metric.key}_interval"]
        yield Row(
            task=task if first else "",
            metric=f"{metric.name} {'↓' if metric.lower_is_better else '↑'}",
            value=f"{_number(scores[metric.key], metric.unit)} {metric.unit}",
            interval=" – ".join(_number(bound, metric.unit) for bound in interval) if interval else "–",
            n=str(scores.get(f"{metric.key}_counts", {}).get("utterances", scores["n"])),
            unreadable=str(scores["unreadable"]) if first else "",
            failed=str(scores["failed"]) if first else "",
            notes=", ".join(_notes(scores, defined)) if first else "",
        )


def _notes(scores: Mapping[str, Any], shown: Sequence[Metric]) -> Iterator[str]:
    if scores.get("release_wer") is not None:
        yield f"{_number(scores['release_wer'], '%')} % by the release's scorer"
    if scores.get("matched") is not None:
        yield f"{_number(scores['matched'], '%')} % of words matched"
    beside = [key for key in ("wer", "cer") if scores[key] is not None and key not in [metric.key for metric in shown]]
    if beside:
        yield "transcript " + ", ".join(f"{key.upper()} {_number(scores[key], '%')} %" for key in beside)
    if scores["unlabelled"]:
        yield f"{scores['unlabelled']} without label left out"


def _confusions(task: str, scores: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Lay out the matrix of a task with labels, or one for each part of a combination."""
    for key, confusion in scores.items():
        if key == "confusion":
            yield _confusion(task, confusion, scores["classes"])
        elif key.endswith("_confusion"):
            part = key.removesuffix("_confusion")
            yield _confusion(f"{task}: {part}", confusion, scores[f"{part}_classes"])


def _confusion(title: str, confusion: Mapping[str, Any], classes: Mapping[str, Any]) -> dict[str, Any]:
    labels = confusion["labels"]
    rows = []
    for i, (label, counts) in enumerate(zip(labels, confusion["matrix"], strict=True)):
        n = sum(counts)
        cells = [{"count": c, "share": round(c / n, 3) if n else 0, "right": j == i} for j, c in enumerate(counts)]
        rows.append({"label": label, "cells": cells, "n": n, "accuracy": _number(classes[label]["accuracy"], "%")})
    return {"title": title, "columns": [*labels, NONE], "rows": rows}


def _example(example: Example) -> dict[str, Any]:
    reference, hypothesis = differences(example.reference, example.hypothesis)
    view = {"example": example, "reference": reference, "hypothesis": hypothesis, "image": None}
    if example.mel is None or not len(example.mel):
        return view
    seconds = len(example.mel) / FRAMES_PER_SECOND
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 600, seconds) if seconds / s <= _TICKS)
    words = (example.words or ()) if example.task == "timestamps" else ()
    return view | {
        "image": spectrogram(example.mel),
        "seconds": seconds,
        "ticks": [(100 * i * step / seconds, f"{i * step:g}") for i in range(int(seconds / step) + 1)],
        "words": [
            {
                "word": word,
                "left": 100 * max(0.0, word.start) / seconds,
                "width": 100 * max(0.0, min(word.end, seconds) - max(0.0, word.start)) / seconds,
            }
            for word in words
            if word.start < seconds
        ],
        "least_width": round(seconds * _PIXELS_PER_SECOND) if words else 0,
    }
