"""Kaldi's data folders: ``wav.scp`` and the tables beside it.

Read are ``wav.scp``, ``text``, ``segments``, ``utt2spk``, ``utt2gender`` or ``spk2gender``, ``utt2dur`` and
``utt2lang``.
Source: the Kaldi manual, "Data preparation".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from osum_npu.data.entry import Entry, Fault
from osum_npu.data.lists import beside, read_lines

_GENDERS = {"f": "female", "m": "male"}
_TABLES = ("text", "segments", "utt2spk", "utt2gender", "spk2gender", "utt2dur", "utt2lang")


class _Value(NamedTuple):
    line: int
    text: str


def read_kaldi(folder: str) -> Iterator[Entry | Fault]:
    """Give the utterances of a folder: its segments, or its recordings where it has none.

    An entry of ``wav.scp`` that is a command, ending in ``|``, is a fault: nothing is ever run. A relative path starts
    from the folder, or else from the current one.

    Raises:
        OSError: a table cannot be read.
    """
    scp = os.path.join(folder, "wav.scp")
    faults: list[Fault] = []
    recordings = _table(scp, faults)
    tables = {
        name: _table(os.path.join(folder, name), faults) if os.path.exists(os.path.join(folder, name)) else {}
        for name in _TABLES
    }
    yield from faults
    paths: dict[str, str] = {}
    for name, value in recordings.items():
        if reason := _refused(value.text):
            yield Fault(scp, value.line, name, reason)
        else:
            paths[name] = beside(folder, value.text)
    spans = tables["segments"]
    for key, value in (spans or recordings).items():
        path = os.path.join(folder, "segments") if spans else scp
        row: dict[str, Any] = {"key": key}
        name = key
        if spans:
            name, *times = value.text.split()
            try:
                start, end = map(float, times)
            except ValueError:
                yield Fault(path, value.line, key, f"a segment is <recording> <start> <end>, not {value.text!r:.60}")
                continue
            row |= {"start": start} | ({} if end == -1 else {"end": end})
            if name not in paths:
                known = "cannot be used" if name in recordings else "is not in wav.scp"
                yield Fault(path, value.line, key, f"its recording {name} {known}")
        if name in paths:
            yield Entry(path, value.line, row | {"wav": paths[name]} | _labels(key, tables))
    for key, value in tables["text"].items():
        if key not in (spans or recordings):
            yield Fault(os.path.join(folder, "text"), value.line, key, "it has a transcript and no sound")


def _table(path: str, faults: list[Fault]) -> dict[str, _Value]:
    """Read lines of ``name value``; the first line of a name counts."""
    table: dict[str, _Value] = {}
    for found in read_lines(path):
        if isinstance(found, Fault):
            faults.append(found)
            continue
        line, text = found
        name, *rest = text.split(maxsplit=1)
        if name in table:
            faults.append(Fault(path, line, name, f"it occurs already in line {table[name].line}"))
        elif not rest and os.path.basename(path) != "text":
            faults.append(Fault(path, line, name, "nothing follows the name"))
        else:
            table[name] = _Value(line, rest[0] if rest else "")
    return table


def _refused(entry: str) -> str:
    """Say why an entry of ``wav.scp`` names no sound file; empty where it does."""
    if entry.endswith("|") or entry.startswith("|"):
        return f"it is a command, and commands are not run; write the sound to a file: {entry!r:.80}"
    if os.path.splitext(entry)[1].startswith(".ark"):
        return f"it lies in a Kaldi archive, which is not read; write the sound to a file: {entry!r:.80}"
    return ""


def _labels(key: str, tables: dict[str, dict[str, _Value]]) -> dict[str, Any]:
    """Return what the tables say about an utterance."""

    def value(table: str, name: str = key) -> str | None:
        return tables[table][name].text if name in tables[table] else None

    speaker = value("utt2spk")
    gender = value("utt2gender") or (value("spk2gender", speaker) if speaker else None)
    duration = value("utt2dur")
    try:
        seconds: float | str | None = None if duration is None else float(duration)
    except ValueError:
        seconds = duration  # said to be no number where the row is checked
    row = {
        "txt": value("text") or None,
        "speaker": speaker,
        "gender": _GENDERS.get((gender or "").lower(), gender),
        "duration": seconds,
        "lang": value("utt2lang"),
    }
    return {name: value for name, value in row.items() if value is not None}
