"""The index of a shard: its rows and where their sounds lie, kept in a file so that a tar is gone through only once.

The index of ``a.tar`` is ``a.tar.index`` beside it or, where that folder cannot be written, a file of the user's cache;
where that cannot be written either, it is made anew each time. It counts as long as size and time of the tar are those
it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from osum_npu.audio.tar_member import TarMember
from osum_npu.data.shard import SOUND_FIELDS, Shard, read_shard
from osum_npu.data.tar import Damage
from osum_npu.files import write_text

_VERSION = 2
"""To be raised with every change of what :func:`read_shard` finds in a tar."""


def indexed_shard(path: str) -> Shard:
    """Return what :func:`read_shard` finds in a tar, from its index where that is still true.

    Raises:
        OSError: the tar cannot be opened or read.
    """
    state = os.stat(path)
    stamp = {"version": _VERSION, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    places = list(_places(path))
    for place in places:
        if shard := _read(place, path, stamp):
            return shard
    shard = read_shard(path)
    text = _write(shard, stamp)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_text(place, text)
            break
        except OSError:
            continue
    return shard


def _places(path: str) -> Iterator[Path]:
    """Give the files that may hold the index, the preferred one first."""
    yield Path(f"{path}.index")
    name = hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=16).hexdigest()
    yield Path(os.path.expanduser("~"), ".cache", "osum-npu", "indexes", f"{name}.index")


def _read(place: Path, tar: str, stamp: dict[str, int]) -> Shard | None:
    try:
        with place.open(encoding="utf-8") as file:
            head = json.loads(next(file))
            if {name: head[name] for name in stamp} != stamp:
                return None
            rows = [_row(tar, *json.loads(line)) for line in file]
            shard = Shard(rows, [Damage(*fault) for fault in head["faults"]])
    except (OSError, ValueError, TypeError, LookupError, StopIteration):  # none there, or a damaged one
        return None
    return shard if len(rows) == head["rows"] else None


def _row(
    tar: str, row: object, name: object, offset: object, length: object
) -> tuple[dict[str, Any], TarMember | None]:
    match row, name, offset, length:
        case dict(), None, 0, 0:
            return row, None
        case dict(), str(), int(), int() if name.rpartition(".")[2].lower() in SOUND_FIELDS:
            return row, TarMember(tar, name, offset, length)
    raise ValueError("this was not written by _write")


def _write(shard: Shard, stamp: dict[str, int]) -> str:
    head: dict[str, Any] = {**stamp, "rows": len(shard.rows), "faults": shard.faults}
    lines = [head, *([row, *(sound[1:] if sound else (None, 0, 0))] for row, sound in shard.rows)]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
