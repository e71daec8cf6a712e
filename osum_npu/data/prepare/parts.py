"""What all corpora share: reading their tables, taking lengths from sound headers, writing one manifest a part."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from osum_npu.audio.read import AudioError, probe
from osum_npu.data.manifest import write_manifest
from osum_npu.tasks import Utterance, normalize_text

GENDERS = {"f": "female", "m": "male"}


class Skipped(NamedTuple):
    """A recording or a transcript that could not be used."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Summary:
    """What was written and what was not."""

    rows: dict[Path, int]
    """Number of rows by manifest."""
    skipped: list[Skipped]

    def __str__(self) -> str:
        written = [f"{path}: {count} rows" for path, count in self.rows.items()]
        return "\n".join([*written, *(f"skipped {path}: {reason}" for path, reason in self.skipped)])


def write_parts(out: Path, parts: Mapping[str, Sequence[Utterance | Skipped]]) -> Summary:
    """Write ``out/<part>.jsonl`` for each part that has rows; durations come from the sound files' headers.

    Raises:
        ValueError: nothing is left to write.
    """
    rows: dict[Path, int] = {}
    skipped: list[Skipped] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part, found in parts.items():
            timed = list(pool.map(_with_duration, found))
            utterances = [item for item in timed if isinstance(item, Utterance)]
            skipped += [item for item in timed if isinstance(item, Skipped)]
            if utterances:
                path = out / f"{part}.jsonl"
                rows[path] = write_manifest(path, utterances)
    if not rows:
        reasons = "".join(f"\n{path}: {reason}" for path, reason in skipped[:10])
        raise ValueError(f"no usable recording was found; {len(skipped)} were skipped{reasons}")
    return Summary(rows, skipped)


def transcript(text: str | None) -> str | None:
    """Write a corpus's text as this project does; ``None`` where there is none."""
    return normalize_text(text or "").strip() or None


def wanted(path: Path, what: str) -> Path:
    """Return ``path``.

    Raises:
        ValueError: there is no such file or folder, so that the corpus is not what was said.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: {what}")
    return path


def read_table(path: Path) -> dict[str, str]:
    """Read lines of ``name value …`` (Kaldi's way): the value by name, empty where a line holds a name alone."""
    pairs = (line.split(maxsplit=1) for line in path.read_text("utf-8").splitlines() if line.strip())
    return {name: "".join(value).strip() for name, *value in pairs}


def _with_duration(item: Utterance | Skipped) -> Utterance | Skipped:
    if isinstance(item, Skipped):
        return item
    assert item.wav is not None
    try:
        return replace(item, duration=probe(item.wav).seconds)
    except AudioError as error:
        return Skipped(Path(str(item.wav)), str(error))
