"""What a linear probe on mean log-mel reaches on the labels of the dev lists, and a trained model beside it.

    python recipes/small_real/probe.py DATA [--predictions REPORT/predictions.jsonl]

``DATA`` is what ``make_data.py`` wrote. A clip becomes one vector: the mean of its log-mel over time (80 numbers), or
mean and standard deviation (160). A logistic regression learns the label from it. A model that hears more than the
colour of a recording must do better. With ``--predictions``, which ``osum-npu eval`` writes, a model stands beside it;
it must have been asked about the same dev lists.

Shapes: N clips, D features, K classes, T frames, M mel bins.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from osum_npu.audio.mel import log_mel
from osum_npu.audio.read import read_audio
from osum_npu.data.manifest import read_manifest
from osum_npu.evaluation.metrics import score
from osum_npu.evaluation.text import tokens
from osum_npu.tasks import TASKS, Answer, Utterance, Word

DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of the squared penalty on the weights; which is best is found on the training part."""
FOLDS = 4
Truth = Callable[[Utterance], str | None]
"""The class of an utterance in a question; ``None`` where it has none."""


@dataclass(frozen=True)
class Question:
    """A label to tell from sound: of some sources, over some dev clips."""

    name: str
    task: str
    sources: tuple[str, ...]
    """Manifests, by the beginning of their names."""
    truth: Truth
    counts: Callable[[Utterance], bool] = lambda _: True
    """Which dev clips are scored."""


def _label(task: str) -> Truth:
    return lambda utterance: utterance.labels.get(task)


def _of_age(age: str) -> Callable[[Utterance], bool]:
    return lambda utterance: utterance.labels.get("age") == age


def _from_esc10(utterance: Utterance) -> bool:
    return utterance.key.startswith("esc10_")


SPEECHOCEAN, LIBRISPEECH, EVENTS = ("speechocean762",), ("librispeech_mini",), ("events",)
QUESTIONS = (
    Question("gender, speechocean762", "gender-only", SPEECHOCEAN, _label("gender")),
    Question("gender, its adults", "gender-only", SPEECHOCEAN, _label("gender"), _of_age("adult")),
    Question("gender, its children", "gender-only", SPEECHOCEAN, _label("gender"), _of_age("child")),
    Question("gender, librispeech_mini", "gender-only", LIBRISPEECH, _label("gender")),
    Question("age, speechocean762", "age-only", SPEECHOCEAN, _label("age")),
    Question("event", "event-only", EVENTS, _label("event")),
    Question("event, ESC-10 clips", "event-only", EVENTS, _label("event"), _from_esc10),
    Question("event, the others", "event-only", EVENTS, _label("event"), lambda u: not _from_esc10(u)),
    Question("digit, fsdd", "asr", ("fsdd",), lambda utterance: utterance.text),
)


@dataclass(frozen=True)
class Score:
    """How often a question was answered rightly."""

    n: int
    accuracy: float
    balanced: float
    """Mean of the accuracies of the classes."""


def main() -> None:
    """Read the command line; print the table."""
    parser = argparse.ArgumentParser(description="A linear probe on mean log-mel, and a model beside it.")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder that make_data.py wrote")
    parser.add_argument("--predictions", type=Path, help="predictions.jsonl of osum-npu eval over DATA/dev/*.jsonl")
    parser.add_argument("--out", type=Path, help="also write the table there, as JSON")
    arguments = parser.parse_args()
    table = compare(arguments.data, arguments.predictions)
    print(_written(table))
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    if arguments.predictions:
        for line in transcription(arguments.data / "dev", arguments.predictions):
            print(line)


def compare(data: Path, predictions: Path | None = None) -> list[dict[str, Any]]:
    """Answer every question by both probes and, where there are predictions, by the model.

    Returns:
        A row for each question that dev has clips for: ``question``, ``n``, and for each of ``mean``, ``mean_std`` and
        ``model`` the ``accuracy`` and ``balanced`` accuracy.
    """
    answers = _answers(predictions) if predictions else None
    features: dict[tuple[str, ...], tuple[list[Utterance], Tensor, list[Utterance], Tensor]] = {}
    rows = []
    for question in QUESTIONS:
        if question.sources not in features:
            train, dev = (_utterances(data / part, question.sources) for part in ("train", "dev"))
            features[question.sources] = train, describe(train), dev, describe(dev)
        train, train_ND, dev, dev_ND = features[question.sources]
        asked = [i for i, utterance in enumerate(dev) if question.truth(utterance) and question.counts(utterance)]
        if not asked:
            continue
        truth = [str(question.truth(dev[i])) for i in asked]
        labels = [str(question.truth(utterance)) for utterance in train]
        row: dict[str, Any] = {"question": question.name, "n": len(asked)}
        half = train_ND.shape[1] // 2
        for name, width in (("mean", half), ("mean_std", 2 * half)):
            said = probe(train_ND[:, :width], labels, _groups(train, dev), dev_ND[asked, :width])
            row[name] = vars(measure(truth, said))
        if answers is not None:
            told = [answers.get((question.task, dev[i].key)) for i in asked]
            row["model"] = vars(measure(truth, [_class(question, dev[i], a) for i, a in zip(asked, told)]))
        rows.append(row)
    return rows


def describe(utterances: Sequence[Utterance]) -> Tensor:
    """Return mean and standard deviation of each clip's log-mel over time, float32 ``[N, 2 M]``."""
    rows = []
    for utterance in tqdm(utterances, "log-mel", unit="clip", leave=False):
        wave = torch.from_numpy(read_audio(utterance.wav, utterance.start, utterance.end))
        features_1TM = log_mel(wave[None], [len(wave)])
        rows.append(torch.cat([features_1TM[0].mean(0), features_1TM[0].std(0, correction=0)]))
    return torch.stack(rows)


def probe(train_ND: Tensor, labels: Sequence[str], groups: Sequence[str], test_ND: Tensor) -> list[str]:
    """Classify by a logistic regression in which all classes weigh the same.

    The penalty is the one of ``DECAYS`` that does best on held-out quarters of the training part.

    Args:
        train_ND: features to learn from.
        labels: class of each.
        groups: of each, what it must share a quarter with.
        test_ND: features to classify.
    """
    classes = sorted(set(labels))
    target_N = torch.tensor([classes.index(label) for label in labels])
    order = {group: i for i, group in enumerate(np.random.RandomState(0).permutation(sorted(set(groups))))}
    fold_N = torch.tensor([order[group] % FOLDS for group in groups])
    folds = [fold_N == i for i in range(FOLDS)]
    folds = [held for held in folds if 0 < held.sum() < len(labels)]

    def right(decay: float) -> float:
        said_N = torch.empty_like(target_N)
        for held in folds:
            said_N[held] = _classify(train_ND[~held], target_N[~held], train_ND[held], len(classes), decay)
        return measure(target_N.tolist(), said_N.tolist()).balanced

    best = max(DECAYS, key=right)
    return [classes[i] for i in _classify(train_ND, target_N, test_ND, len(classes), best).tolist()]


def _classify(train_ND: Tensor, target_N: Tensor, test_ND: Tensor, classes: int, decay: float) -> Tensor:
    """Fit by L-BFGS on standardised features; return the likeliest class of each test clip."""
    mean_D, std_D = train_ND.mean(0), train_ND.std(0).clamp(min=1e-5)
    x_ND, counts_K = (train_ND - mean_D) / std_D, torch.bincount(target_N, minlength=classes)
    weights_K = torch.where(counts_K > 0, len(target_N) / (classes * counts_K.clamp(min=1)), 0)
    weight_DK = torch.zeros(x_ND.shape[1], classes, requires_grad=True)
    bias_K = torch.zeros(classes, requires_grad=True)
    fit = torch.optim.LBFGS([weight_DK, bias_K], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        fit.zero_grad()
        value = F.cross_entropy(x_ND @ weight_DK + bias_K, target_N, weights_K)
        value = value + decay * weight_DK.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    fit.step(loss)  # type: ignore[no-untyped-call]
    return (((test_ND - mean_D) / std_D) @ weight_DK + bias_K).argmax(1).detach()


def measure(truth: Sequence[Any], said: Sequence[Any]) -> Score:
    """Return accuracy, and the mean over the classes that occur."""
    right: NDArray[np.bool_] = np.array([t == s for t, s in zip(truth, said)])
    by_class = [right[[t == one for t in truth]].mean() for one in dict.fromkeys(truth)]
    return Score(len(truth), float(right.mean()), float(np.mean(by_class)))


def transcription(dev: Path, predictions: Path) -> list[str]:
    """Say how well the model writes down and times each dev list: error rates, and the shift of word times."""
    answers = _answers(predictions)
    lines = []
    for task, source, keys in (
        ("asr", "zh_hsk", ("cer",)),
        ("asr", "speechocean762", ("wer",)),
        ("asr", "timestamps", ("wer", "cer")),
        ("timestamps", "timestamps", ("aas_ms", "matched")),
    ):
        pairs = [(u, answers.get((task, u.key))) for u in _utterances(dev, (source,))]
        scores = score(TASKS[task], pairs)
        for key in keys:
            number = f"{scores[key]:.1f} ms" if key == "aas_ms" else f"{100 * scores[key]:.2f} %"
            lines.append(f"{source}, {task}: {key.removesuffix('_ms').upper()} {number} (n = {scores['n']})")
    return lines


def _utterances(folder: Path, sources: tuple[str, ...]) -> list[Utterance]:
    paths = sorted(path for path in folder.glob("*.jsonl") if path.stem.startswith(sources))
    if not paths:
        raise ValueError(f"{folder} has no manifest of {', '.join(sources)}; make_data.py writes them")
    return [utterance for path in paths for utterance in read_manifest(path).utterances]


def _answers(predictions: Path) -> dict[tuple[str, str], Answer]:
    """Read what ``osum-npu eval`` wrote, by task and key."""
    answers = {}
    for line in predictions.read_text("utf-8").splitlines():
        row = json.loads(line)
        if "error" in row:
            continue
        fields = row["results"][row["task"]]
        if "words" in fields:
            fields["words"] = tuple(Word(*word) for word in fields["words"])
        answers[row["task"], row["key"]] = Answer(**fields)
    return answers


def _class(question: Question, utterance: Utterance, answer: Answer | None) -> str | None:
    """Take the model's class from its answer: the label, or the words as they are scored."""
    if answer is None:
        return None
    if question.task != "asr":
        return (answer.labels or {}).get(question.task.removesuffix("-only"))
    truth = question.truth(utterance) or ""
    return truth if tokens(answer.text or "", "en") == tokens(truth, "en") else answer.text


def _groups(train: Sequence[Utterance], dev: Sequence[Utterance]) -> list[str]:
    """Group clips by speaker where dev has other speakers than the training part, else each by itself."""
    known = {u.speaker for u in train if u.speaker} & {u.speaker for u in dev}
    return [u.key if known else u.speaker or u.key for u in train]


def _written(table: list[dict[str, Any]]) -> str:
    """Write the table as Markdown: accuracy and, behind the stroke, balanced accuracy."""
    columns = [name for name in ("mean", "mean_std", "model") if name in table[0]]
    lines = [f"| label | clips | {' | '.join(columns)} |", "|" + "---|" * (2 + len(columns))]
    for row in table:
        cells = [f"{100 * row[name]['accuracy']:.1f} / {100 * row[name]['balanced']:.1f}" for name in columns]
        lines.append(f"| {row['question']} | {row['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
