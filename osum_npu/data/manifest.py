"""Manifests: lists of recordings with their labels, one JSON object a line (see :mod:`osum_npu.data.row`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from osum_npu.audio.read import SAMPLE_RATE, AudioError, read_audio
from osum_npu.data.row import DURATION_TOLERANCE, parse_row
from osum_npu.tasks import Utterance

PROGRESS_ROWS = 1000
"""Checking the sound of more rows than this shows a progress bar."""

_CHUNK = 16  # rows a thread takes at once
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Fault:
    """What is wrong with one row of a manifest."""

    path: str
    line: int
    key: str
    """Key of the row; empty where it could not be read."""
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (f"{self.path}:{self.line}", self.key, self.reason) if part)


@dataclass(frozen=True)
class Manifest:
    """The good rows of a file, and every fault of the others in the order of lines."""

    utterances: list[Utterance]
    faults: list[Fault]


def read_manifest(path: str | os.PathLike[str], *, check_audio: bool = False) -> Manifest:
    """Read a manifest. Faulty rows are left out and named; they do not end the reading.

    Args:
        path: a JSONL file in UTF-8; empty lines are allowed.
        check_audio: also decode every sound and compare it with its row. A duration that is not given is filled in.

    Raises:
        ValueError: the file cannot be opened.
    """
    name = os.fspath(path)
    rows: list[tuple[int, Utterance]] = []
    faults: list[Fault] = []
    first_lines: dict[str, int] = {}
    try:
        for line, row, reason in _json_lines(name):
            utterance, reasons = (None, [reason]) if reason else parse_row(row, os.path.dirname(name))
            key = row["key"] if isinstance(row, dict) and isinstance(row.get("key"), str) else ""
            if key and (first := first_lines.setdefault(key, line)) != line:
                reasons.append(f"the key occurs already in line {first}")
            elif utterance:
                rows.append((line, utterance))
            faults += [Fault(name, line, key, reason) for reason in reasons]
    except OSError as error:
        raise ValueError(f"cannot read the manifest {name}: {error.strerror}") from error
    if check_audio:
        rows, unsound = _check_audio(name, rows)
        faults = sorted([*faults, *unsound], key=lambda fault: fault.line)
    if not rows and not faults:
        faults.append(Fault(name, 1, "", "the manifest holds no rows"))
    return Manifest([utterance for _, utterance in rows], faults)


def write_manifest(path: str | os.PathLike[str], utterances: Iterable[Utterance]) -> int:
    """Write a manifest in one step: the file appears whole or not at all.

    A sound below the manifest's folder is named relative to it, so that the folder can be moved; another one by its
    absolute path. :func:`read_manifest` gives the same utterances back.

    Returns:
        The number of rows.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = os.path.join(os.path.abspath(target.parent), "")
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    count = 0
    try:
        with draft.open("w", encoding="utf-8") as file:
            for utterance in utterances:
                file.write(json.dumps(_row(utterance, folder), ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return count


def _json_lines(name: str) -> Iterator[tuple[int, Any, str]]:
    """Give line number, decoded line and what is wrong with it; empty lines are passed over."""
    with open(name, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(_UTF16_MARKS):
                yield number, None, "the file is in UTF-16; save it as UTF-8"
                return
            if number == 1 and line.startswith(_UTF8_MARK):
                yield number, None, "the file begins with a byte-order mark; save it as UTF-8 without one"
                line = line.removeprefix(_UTF8_MARK)
            if not line.strip():
                continue
            if b"\0" in line:
                yield number, None, f"the line holds {line.count(0)} null bytes; the file is damaged or no text"
                continue
            try:
                yield number, json.loads(line.decode()), ""
            except UnicodeDecodeError as error:
                yield number, None, f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is no UTF-8"
            except (ValueError, RecursionError) as error:
                yield number, None, f"no JSON: {error}"


def _check_audio(name: str, rows: list[tuple[int, Utterance]]) -> tuple[list[tuple[int, Utterance]], list[Fault]]:
    """Decode the sound of all rows on all cores."""

    def check(chunk: list[tuple[int, Utterance]]) -> list[tuple[int, Utterance, str]]:
        return [(line, *_sound(utterance)) for line, utterance in chunk]

    chunks = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
    bar = tqdm(total=len(rows), desc="checking sound", unit="row", disable=len(rows) <= PROGRESS_ROWS)
    good, faults = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for results in pool.map(check, chunks):
            bar.update(len(results))
            good += [(line, utterance) for line, utterance, reason in results if not reason]
            faults += [Fault(name, line, utterance.key, reason) for line, utterance, reason in results if reason]
    return good, faults


def _sound(utterance: Utterance) -> tuple[Utterance, str]:
    """Fill in the duration; the second value tells what the sound and the row disagree on."""
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
    wav = os.path.abspath(utterance.wav)
    row = {
        "key": utterance.key,
        "wav": wav.removeprefix(folder),
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
    }
    return {name: value for name, value in row.items() if value is not None}
