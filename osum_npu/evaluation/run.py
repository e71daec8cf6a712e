"""A model on labelled data: answers, scores, report."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from osum_npu import __version__
from osum_npu.audio.mel import log_mel
from osum_npu.audio.read import read_audio
from osum_npu.data.manifest import read_manifest
from osum_npu.evaluation.following import Wording, measure, read_following
from osum_npu.evaluation.metrics import Pair, score
from osum_npu.evaluation.report import Example, write_report
from osum_npu.files import write_text
from osum_npu.inference.engine import Engine, Result
from osum_npu.tasks import Task, Utterance, get_task, missing, write
from osum_npu.tasks.instructions import can_be_asked, draw_instruction
from osum_npu.training.log import read_log

_EXAMPLES = 2
"""Examples shown of each task."""


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    scores: dict[str, dict[str, Any]]
    """By task name."""
    instructions: dict[str, Any]
    """What :func:`osum_npu.evaluation.following.measure` found."""
    skipped: list[str]
    page: Path


def evaluate(
    model: str | Path,
    manifests: Sequence[str | Path],
    tasks: Sequence[Task],
    out: Path,
    *,
    limit: int | None = None,
    natural: bool = False,
    stages: Mapping[str, Path] | None = None,
    log: Path | None = None,
    facts: Mapping[str, str] | None = None,
    **settings: Any,
) -> Report:
    """Score a model and write ``report.json``, ``report.html`` and ``predictions.jsonl`` into ``out``.

    Each task is asked about the utterances that carry its labels. An utterance that cannot be read counts as an error
    in every task, and is named.

    Args:
        model: model directory.
        manifests: labelled data.
        tasks: what to ask.
        out: folder to write.
        limit: at most so many utterances a task, spread evenly over the data.
        natural: ask about the same utterances in natural language, too, in words of the test split, and compare.
            A row that has a prompt and the intent of it is asked by its prompt; the fixed wording is that of the task.
        stages: reports of earlier stages by name, whose instruction following is shown beside this one.
        log: ``log.jsonl`` of the training, for the learning curves.
        facts: more for the report to state.
        settings: of :class:`Engine`: how it is asked and how it answers.

    Raises:
        ValueError: no utterance carries the labels of any of the tasks, a report of a stage cannot be used, or there is
            one for a model whose answers do not tell which instruction they follow.
    """
    earlier = {name: read_following(path) for name, path in (stages or {}).items()}
    utterances: list[Utterance] = []
    skipped: list[str] = []
    for path in manifests:
        manifest = read_manifest(path)
        utterances += manifest.utterances
        skipped += [str(fault) for fault in manifest.faults]
    asked = {task.name: _spread([u for u in utterances if not missing(task, u)], limit) for task in tasks}
    if not any(asked.values()):
        raise ValueError(f"no utterance of {', '.join(map(str, manifests))} carries labels for {', '.join(asked)}")
    engine = Engine.load(model, **settings)
    if stages and not engine.form.prefix:
        raise ValueError(
            f"reports of stages tell how instructions were followed, but answers of the model in {model} do not begin "
            "with the tags of their task, so that it cannot be put beside them; leave the stages out"
        )
    results: dict[Wording, dict[str, list[Result]]] = {"fixed": {}, **({"natural": {}} if natural else {})}
    for task in tasks:
        for wording in results:
            asking = _worded(task, asked[task.name], wording, engine) if natural else asked[task.name]
            answered = tqdm(engine.answer(asking, [task]), task.name, len(asking), unit="utt", leave=False)
            if asking:
                results[wording][task.name] = list(answered)
    scores = {name: score(get_task(name), _pairs(name, found)) for name, found in results["fixed"].items()}
    every = [r for by_task in results.values() for rs in by_task.values() for r in rs]
    skipped += list(dict.fromkeys(r.error for r in every if r.error is not None))
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"task": name, "wording": wording, "prompt": result.utterance.prompt, **result.as_json()}
        for wording, by_task in results.items()
        for name, answered in by_task.items()
        for result in answered
    ]
    write_text(out / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    pairs = {w: {name: _pairs(name, found) for name, found in by_task.items()} for w, by_task in results.items()}
    instructions = measure(pairs, engine.form)
    page = write_report(
        out,
        title="What the model understands",
        scores=scores,
        examples=[example for task in tasks for example in _examples(task, results["fixed"].get(task.name, []))],
        instructions=instructions,
        earlier=earlier,
        curves=read_log(log) if log is not None else [],
        facts={
            "model": str(model),
            "data": ", ".join(map(str, manifests)),
            "device": str(engine.device),
            "date": datetime.date.today().isoformat(),
            "osum-npu": __version__,
            "torch": str(torch.__version__),
            **(facts or {}),
        },
        skipped=skipped,
    )
    return Report(scores, instructions, skipped, page)


def _spread(utterances: list[Utterance], limit: int | None) -> list[Utterance]:
    if limit is None or len(utterances) <= limit:
        return utterances
    return [utterances[i * len(utterances) // limit] for i in range(limit)]


def _worded(task: Task, utterances: Sequence[Utterance], wording: Wording, engine: Engine) -> list[Utterance]:
    """Ask for a task in one of the wordings; in natural language only where the model is shown what is asked."""
    if wording == "fixed":
        return [replace(u, prompt=None, intent=None) if task.hears else u for u in utterances]
    if task.kind not in engine.form.prompt or not can_be_asked(task):
        return []
    return [
        u if u.intent else replace(u, prompt=draw_instruction(task, "test", _rng(task, u, engine)), intent=task.name)
        for u in utterances
    ]


def _rng(task: Task, utterance: Utterance, engine: Engine) -> random.Random:
    return random.Random(f"eval/{engine.seed}/{task.name}/{utterance.key}")


def _pairs(name: str, results: Sequence[Result]) -> list[Pair]:
    return [(result.utterance, result.answers.get(name)) for result in results]


def _examples(task: Task, results: Sequence[Result]) -> list[Example]:
    """Take some answered utterances from the middle of a task's list."""
    good = [result for result in results if result.error is None]
    chosen = [good[(2 * i + 1) * len(good) // (2 * _EXAMPLES)] for i in range(min(_EXAMPLES, len(good)))]
    return [
        Example(
            key=result.utterance.key,
            task=task.name,
            wav="" if result.utterance.wav is None else str(result.utterance.wav),
            reference=write(task, result.utterance),
            hypothesis=result.raw[task.name],
            mel=_mel(result.utterance),
            words=result.answers[task.name].words,
        )
        for result in chosen
    ]


def _mel(utterance: Utterance) -> NDArray[np.float32] | None:
    if utterance.wav is None:
        return None
    wave = torch.from_numpy(read_audio(utterance.wav, utterance.start, utterance.end))
    features = log_mel(wave[None], [len(wave)])
    mel: NDArray[np.float32] = features[0].numpy()
    return mel
