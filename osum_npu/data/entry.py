"""What the readers of manifests give, whatever the format: rows with the place they stand at, and faults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from osum_npu.audio.tar_member import TarMember


class Entry(NamedTuple):
    """A row as a file holds it, not yet checked."""

    path: str
    """File that holds the row."""
    line: int | None
    """Its line there; ``None`` in a tar."""
    row: object
    """What :func:`osum_npu.data.row.parse_row` takes."""
    folder: str = ""
    """What a relative ``wav`` starts from."""
    sound: TarMember | None = None
    """Where the sound lies, if not in the file that ``wav`` names."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with one row of a manifest, or with a member of a tar."""

    path: str
    line: int | None
    """``None`` in a tar."""
    key: str
    """Key of the row or name of the member; empty where there is none."""
    reason: str

    def __str__(self) -> str:
        place = self.path if self.line is None else f"{self.path}:{self.line}"
        return ": ".join(part for part in (place, self.key, self.reason) if part)
