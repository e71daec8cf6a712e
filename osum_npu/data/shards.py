"""Lists of shards: plain ones, a tar a line, and combined ones, where a JSONL beside each tar says what its sounds are.

Forms, by ASLP-lab/OSUM:

* ``shards_list.txt``: a tar a line;
* a list of lines ``rows.jsonl|sounds.tar``, or ``-|sounds.tar`` for a tar that speaks for itself;
* ``combines_list.txt``: a JSONL a line, with ``combines_tar_root.txt`` beside it, which names the folder of the tars; a
  tar is called like its JSONL.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from tqdm import tqdm

from osum_npu.audio.tar_member import TarMember
from osum_npu.data.entry import Entry, Fault
from osum_npu.data.jsonl import read_jsonl
from osum_npu.data.lists import beside, read_lines
from osum_npu.data.shard import Shard
from osum_npu.data.shard_index import indexed_shard

TAR_ROOT = "combines_tar_root.txt"
"""File beside a list of JSONL files that names the folder of their tars."""

_MANY_TARS = 20  # reading so many shows a progress bar
_AHEAD = 32  # shards that are read ahead
_SPAN = ("start", "end")


class _Part(NamedTuple):
    """A line of a list."""

    line: int
    tar: str
    jsonl: str | None = None


def read_tar(path: str) -> Iterator[Entry | Fault]:
    """Give the rows of one shard.

    Raises:
        OSError: the tar cannot be read.
    """
    yield from _plain(path, indexed_shard(path))


def read_shards(path: str) -> Iterator[Entry | Fault]:
    """Give the rows of all shards of a list, in the order of lines.

    Raises:
        OSError: the list cannot be read. A tar that cannot be read is a fault.
    """
    parts: list[_Part] = []
    for found in _parts(path):
        if isinstance(found, Fault):
            yield found
        else:
            parts.append(found)
    for part, shard in tqdm(_opened(parts), "reading shards", len(parts), unit="tar", disable=len(parts) < _MANY_TARS):
        if isinstance(shard, OSError):
            yield Fault(path, part.line, "", f"cannot read the shard {part.tar}: {shard.strerror or shard}")
        elif part.jsonl is None:
            yield from _plain(part.tar, shard)
        else:
            yield from _combined(path, part.line, part.jsonl, part.tar, shard)


def _parts(path: str) -> Iterator[_Part | Fault]:
    """Read a list of any of the three forms."""
    folder = os.path.dirname(path)
    root: str | None = None
    for found in read_lines(path):
        if isinstance(found, Fault):
            yield found
            continue
        line, text = found
        rows, bar, tar = text.rpartition("|")
        if "://" in text:
            yield Fault(path, line, "", f"{text!r:.80} is an address; only files of this machine are read")
        elif bar:
            jsonl = None if rows.strip() == "-" else beside(folder, rows.strip())
            yield _Part(line, beside(folder, tar.strip()), jsonl)
        elif text.endswith(".jsonl"):
            root = root or _tar_root(folder)
            yield _Part(line, os.path.join(root, os.path.basename(text)[: -len("jsonl")] + "tar"), beside(folder, text))
        else:
            yield _Part(line, beside(folder, text))


def _tar_root(folder: str) -> str:
    path = os.path.join(folder, TAR_ROOT)
    lines = read_lines(path) if os.path.exists(path) else iter(())
    for found in lines:
        if not isinstance(found, Fault):
            return beside(folder, found[1])
    raise OSError(None, f"{path}, which names the folder of its tars, is missing or empty")


def _opened(parts: list[_Part]) -> Iterator[tuple[_Part, Shard | OSError]]:
    """Read shards on all cores, in order and not too far ahead."""

    def opened(part: _Part) -> Shard | OSError:
        try:
            return indexed_shard(part.tar)
        except OSError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(parts), _AHEAD):
            some = parts[start : start + _AHEAD]
            yield from zip(some, pool.map(opened, some))


def _plain(tar: str, shard: Shard) -> Iterator[Entry | Fault]:
    yield from (Fault(tar, None, *fault) for fault in shard.faults)
    yield from (Entry(tar, None, row, "", sound) for row, sound in shard.rows)


def _combined(path: str, line: int, jsonl: str, tar: str, shard: Shard) -> Iterator[Entry | Fault]:
    """Give the rows of a JSONL with the sounds of a tar; what a row leaves open is taken from the tar."""
    yield from (Fault(tar, None, *fault) for fault in shard.faults)
    sounds: dict[Any, tuple[dict[str, Any], TarMember | None]] = {row["key"]: (row, sound) for row, sound in shard.rows}
    try:
        for found in read_jsonl(jsonl):
            if isinstance(found, Fault) or not isinstance(found.row, dict):
                yield found
                continue
            key = found.row.get("key")
            if not isinstance(key, str) or key not in sounds:
                named = key if isinstance(key, str) else ""
                yield Fault(jsonl, found.line, named, f"{tar} holds no such key" if named else "no key")
                continue
            row, sound = sounds[key]
            given = {name: value for name, value in found.row.items() if value is not None}
            kept = {name: value for name, value in row.items() if name != "duration" or not given.keys() & {*_SPAN}}
            yield Entry(jsonl, found.line, kept | given | {"wav": sound and sound.name}, "", sound)
    except OSError as error:
        yield Fault(path, line, "", f"cannot read {jsonl}: {error.strerror or error}")
