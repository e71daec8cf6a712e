"""Manifests: lists of recordings with their labels, in any of the forms that are read.

========================  ==========================================================================================
a file of JSON objects    one a line (:mod:`osum_npu.data.jsonl`); every other file is taken for one, too
``*.tar``                 a shard (:mod:`osum_npu.data.shard`)
a list of tars            of JSONL files or of pairs of the two (:mod:`osum_npu.data.shards`)
folder with ``wav.scp``   Kaldi's (:mod:`osum_npu.data.kaldi`)
========================  ==========================================================================================

What a row may say is the same in all of them: :mod:`osum_npu.data.row`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from osum_npu.audio.read import SAMPLE_RATE, AudioError, read_audio
from osum_npu.audio.tar_member import TarMember
from osum_npu.data.entry import Entry, Fault
from osum_npu.data.jsonl import read_jsonl
from osum_npu.data.kaldi import read_kaldi
from osum_npu.data.row import DURATION_TOLERANCE, parse_row
from osum_npu.data.shards import read_shards, read_tar
from osum_npu.files import replaced
from osum_npu.tasks import Utterance

PROGRESS_ROWS = 1000
"""Checking the sound of more rows than this shows a progress bar."""

_CHUNK = 16  # rows a thread takes at once

_Reader = Callable[[str], Iterator[Entry | Fault]]
_HEAD = 4096  # bytes that tell what a file is


class _Place(NamedTuple):
    """Where a row stands."""

    number: int
    """Among all that the reader gave."""
    path: str
    line: int | None

    def seen_from(self, path: str) -> str:
        """Say where this is to somebody who looks at ``path``."""
        if self.path != path:
            return self.path if self.line is None else f"{self.path}:{self.line}"
        return "this file" if self.line is None else f"line {self.line}"


class _Row(NamedTuple):
    place: _Place
    utterance: Utterance


@dataclass(frozen=True)
class Manifest:
    """The good rows of a file, and every fault of the others in the order of lines."""

    utterances: list[Utterance]
    faults: list[Fault]


def is_manifest(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file or folder is a manifest of any form, and no sound or folder of sounds."""
    return _reader(os.fspath(path)) is not None


def read_manifest(path: str | os.PathLike[str], *, check_audio: bool = False) -> Manifest:
    """Read a manifest. Faulty rows are left out and named; they do not end the reading.

    Args:
        path: a manifest of any form.
        check_audio: also decode every sound and compare it with its row. A duration that is not given is filled in.

    Raises:
        ValueError: the manifest cannot be opened.
    """
    name = os.fspath(path)
    rows: list[_Row] = []
    faults: list[tuple[int, Fault]] = []
    first: dict[str, _Place] = {}
    try:
        for number, found in enumerate((_reader(name) or read_jsonl)(name)):
            if isinstance(found, Fault):
                faults.append((number, found))
                continue
            place = _Place(number, found.path, found.line)
            utterance, reasons = parse_row(found.row, found.folder)
            key = found.row["key"] if isinstance(found.row, dict) and isinstance(found.row.get("key"), str) else ""
            if key and (earlier := first.setdefault(key, place)) is not place:
                reasons.append(f"the key occurs already in {earlier.seen_from(found.path)}")
            elif utterance:
                rows.append(_Row(place, replace(utterance, wav=found.sound) if found.sound else utterance))
            faults += [(number, Fault(found.path, found.line, key, reason)) for reason in reasons]
    except OSError as error:
        raise ValueError(f"cannot read the manifest {name}: {error.strerror or error}") from error
    if check_audio:
        rows, unsound = _check_audio(rows)
        faults = sorted([*faults, *unsound], key=lambda pair: pair[0])
    if not rows and not faults:
        faults.append((0, Fault(name, 1, "", "the manifest holds no rows")))
    return Manifest([row.utterance for row in rows], [fault for _, fault in faults])


def write_manifest(path: str | os.PathLike[str], utterances: Iterable[Utterance]) -> int:
    """Write a manifest in one step: the file appears whole or not at all.

    A sound below the manifest's folder is named relative to it, so that the folder can be moved; another one by its
    absolute path. :func:`read_manifest` gives the same utterances back.

    Returns:
        The number of rows.

    Raises:
        ValueError: a sound lies in a tar.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = os.path.join(os.path.abspath(target.parent), "")
    count = 0
    with replaced(target) as draft, draft.open("w", encoding="utf-8") as file:
        for utterance in utterances:
            file.write(json.dumps(_row(utterance, folder), ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def _reader(name: str) -> _Reader | None:
    """Tell by what a file or folder is who reads it; ``None`` where nothing says that it is a manifest."""
    if os.path.isdir(name):
        return read_kaldi if os.path.exists(os.path.join(name, "wav.scp")) else None
    if name.endswith(".jsonl"):
        return read_jsonl
    try:
        with open(name, "rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    if ".tar" in Path(name).suffixes or head[257:262] == b"ustar":
        return read_tar
    lines = [line.strip() for line in head.split(b"\n")]
    if lines[0].startswith(b"{"):
        return read_jsonl
    return read_shards if any(line.endswith((b".tar", b".jsonl")) for line in lines) else None


def _check_audio(rows: list[_Row]) -> tuple[list[_Row], list[tuple[int, Fault]]]:
    """Decode the sound of all rows on all cores."""

    def check(chunk: list[_Row]) -> list[tuple[_Row, str]]:
        checked = [(row.place, *_sound(row.utterance)) for row in chunk]
        return [(_Row(place, utterance), reason) for place, utterance, reason in checked]

    chunks = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
    bar = tqdm(total=len(rows), desc="checking sound", unit="row", disable=len(rows) <= PROGRESS_ROWS)
    good: list[_Row] = []
    faults: list[tuple[int, Fault]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for results in pool.map(check, chunks):
            bar.update(len(results))
            good += [row for row, reason in results if not reason]
            faults += [
                (row.place.number, Fault(row.place.path, row.place.line, row.utterance.key, reason))
                for row, reason in results
                if reason
            ]
    return good, faults


def _sound(utterance: Utterance) -> tuple[Utterance, str]:
    """Fill in the duration; the second value tells what the sound and the row disagree on."""
    if utterance.wav is None:
        return utterance, ""
    try:
        audio = read_audio(utterance.wav, utterance.start, utterance.end)
    except AudioError as error:
        return utterance, str(error)
    seconds = len(audio) / SAMPLE_RATE
    if utterance.duration is not None and abs(utterance.duration - seconds) > DURATION_TOLERANCE:
        return utterance, f"duration is given as {utterance.duration:g} s, the sound lasts {seconds:.3f} s"
    if utterance.words and (last := utterance.words[-1]).end > seconds + DURATION_TOLERANCE:
        return utterance, f"word {last.text!r} ends at {last.end:g} s, the sound lasts {seconds:.3f} s"
    if utterance.text and not audio.any():
        return utterance, "the row has a transcript, the sound is silent throughout"
    return utterance if utterance.duration is not None else replace(utterance, duration=seconds), ""


def _row(utterance: Utterance, folder: str) -> dict[str, Any]:
    if isinstance(utterance.wav, TarMember):
        raise ValueError(f"{utterance.key} lies in {utterance.wav.tar}; a JSONL names files: osum-npu data unpack")
    wav = None if utterance.wav is None else os.path.abspath(utterance.wav)
    row = {
        "key": utterance.key,
        "wav": wav and wav.removeprefix(folder),
        "txt": utterance.text,
        "lang": utterance.lang,
        "speaker": utterance.speaker,
        **utterance.labels,
        "duration": utterance.duration,
        "start": utterance.start or None,
        "end": utterance.end,
        "words": utterance.words,
        "reply": utterance.reply,
        "prompt": utterance.prompt,
        "thought": utterance.thought,
        "intent": utterance.intent,
    }
    return {name: value for name, value in row.items() if value is not None}
