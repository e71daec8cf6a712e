"""What a data set holds: hours by label and language, lengths, texts, and what occurs twice."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from osum_npu.audio.tar_member import TarMember
from osum_npu.data.manifest import read_manifest
from osum_npu.data.sources import with_durations
from osum_npu.tasks import TASKS, Utterance, missing, split_words

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Shares of the rows that are no longer than the lengths reported."""
BINS = 40
"""Bars of the picture of lengths; the longest hundredth of the rows is gathered in the last."""


@dataclass
class Amount:
    """Rows and their sound."""

    rows: int = 0
    seconds: float = 0.0

    def add(self, utterance: Utterance) -> None:
        """Count one row."""
        self.rows += 1
        self.seconds += utterance.duration or 0.0  # a text alone has none

    @property
    def hours(self) -> float:
        """Hours of sound."""
        return self.seconds / 3600


@dataclass
class Statistics:
    """What :func:`measure` found."""

    sources: dict[str, Amount] = field(default_factory=dict)
    total: Amount = field(default_factory=Amount)
    tasks: dict[str, Amount] = field(default_factory=dict)
    """Rows that can serve a task."""
    labels: dict[str, dict[str, Amount]] = field(default_factory=dict)
    """By task and label."""
    languages: dict[str, Amount] = field(default_factory=dict)
    """By language; ``""`` where none is given."""
    speakers: int = 0
    texts: int = 0
    characters: int = 0
    """Of all texts, without spaces."""
    words: int = 0
    """English words and single Han characters."""
    distinct_characters: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Lengths by quantile, and their mean."""
    histogram: list[tuple[float, int]] = field(default_factory=list)
    """Left edge of each bar in seconds, and its rows."""
    bar_seconds: float = 0.0
    same_key: dict[str, list[str]] = field(default_factory=dict)
    """Keys that occur in several sources, with the sources."""
    same_sound: list[list[str]] = field(default_factory=list)
    """Groups of ``source: key`` whose sounds are alike to the byte."""
    faults: list[str] = field(default_factory=list)
    """What could not be used, a line each; keys that occur twice in a source among them."""


def measure(sources: Sequence[str | os.PathLike[str]], *, compare_sounds: bool = True) -> Statistics:
    """Go through manifests of any form.

    Args:
        sources: the manifests.
        compare_sounds: also look for sounds that occur twice, for which files of one length are read.

    Raises:
        ValueError: a manifest cannot be opened, or none holds a row that can be used.
    """
    found = Statistics()
    rows: list[tuple[str, Utterance]] = []
    for source in sources:
        path = os.fspath(source)
        manifest = read_manifest(path)
        found.faults += map(str, manifest.faults)
        for known in with_durations(manifest.utterances):
            if isinstance(known, str):
                found.faults.append(f"{path}: {known}")
            else:
                rows.append((path, known))
                found.sources.setdefault(path, Amount()).add(known)
    if not rows:
        raise ValueError("\n".join(["there is no row to measure:", *found.faults]))
    _count([utterance for _, utterance in rows], found)
    _lengths(np.array([u.duration for _, u in rows if u.wav is not None] or [0.0]), found)
    keys: dict[str, list[str]] = defaultdict(list)
    for path, utterance in rows:
        keys[utterance.key].append(path)
    found.same_key = {key: paths for key, paths in keys.items() if len(paths) > 1}
    if compare_sounds:
        found.same_sound = _same_sounds(rows, found.faults)
    return found


def _count(utterances: Sequence[Utterance], found: Statistics) -> None:
    tasks: dict[str, Amount] = defaultdict(Amount)
    labels: dict[str, dict[str, Amount]] = defaultdict(lambda: defaultdict(Amount))
    languages: dict[str, Amount] = defaultdict(Amount)
    letters: Counter[str] = Counter()
    for utterance in utterances:
        found.total.add(utterance)
        languages[utterance.lang or ""].add(utterance)
        for task in TASKS.values():
            if not missing(task, utterance):
                tasks[task.name].add(utterance)
        for name, label in utterance.labels.items():
            labels[name][label].add(utterance)
        if utterance.text:
            found.texts += 1
            found.words += len(split_words(utterance.text))
            letters.update("".join(utterance.text.split()))
    found.tasks = {name: tasks[name] for name in TASKS if name in tasks}
    found.labels = {
        task.name: {label: labels[task.name][label] for label in task.labels if label in labels[task.name]}
        for task in TASKS.values()
        if task.name in labels
    }
    found.languages = dict(sorted(languages.items(), key=lambda item: -item[1].seconds))
    found.speakers = len({utterance.speaker for utterance in utterances if utterance.speaker})
    found.characters, found.distinct_characters = letters.total(), len(letters)


def _lengths(seconds: np.ndarray[Any, np.dtype[np.float64]], found: Statistics) -> None:
    found.seconds = {f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(seconds, QUANTILES))}
    found.seconds["mean"] = float(seconds.mean())
    found.bar_seconds = max(float(np.quantile(seconds, 0.99)) / BINS, 1e-3)
    counts = np.bincount(np.minimum((seconds / found.bar_seconds).astype(int), BINS - 1), minlength=BINS)
    found.histogram = [(number * found.bar_seconds, int(count)) for number, count in enumerate(counts)]


def _same_sounds(rows: Sequence[tuple[str, Utterance]], faults: list[str]) -> list[list[str]]:
    """Compare sounds of one length by a checksum of their bytes; of spans, start and end must be alike, too."""
    by_size: dict[tuple[int, float, float | None], list[tuple[str, Utterance]]] = defaultdict(list)
    for path, utterance in rows:
        sound = utterance.wav
        if sound is None:
            continue
        try:
            size = sound.length if isinstance(sound, TarMember) else os.path.getsize(sound)
        except OSError as error:
            faults.append(f"{path}: {utterance.key}: cannot read {sound}: {error.strerror or error}")
            continue
        by_size[size, utterance.start, utterance.end].append((path, utterance))
    compared = [pair for group in by_size.values() if len(group) > 1 for pair in group]

    def checksum(pair: tuple[str, Utterance]) -> bytes:
        path, utterance = pair
        sound = utterance.wav
        assert sound is not None
        try:
            content = sound.read() if isinstance(sound, TarMember) else Path(sound).read_bytes()
        except OSError as error:
            faults.append(f"{path}: {utterance.key}: cannot read {sound}: {error.strerror or error}")
            content = repr(sound).encode()
        return hashlib.blake2b(content + f"{utterance.start}-{utterance.end}".encode(), digest_size=16).digest()

    alike: dict[bytes, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = tqdm(pool.map(checksum, compared), "comparing sounds", len(compared), unit="row")
        for digest, (path, utterance) in zip(sums, compared):
            alike[digest].append(f"{path}: {utterance.key}")
    return [group for group in alike.values() if len(group) > 1]
