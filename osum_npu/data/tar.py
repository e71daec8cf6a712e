"""The members of a tar: where each lies, and all that is wrong with it.

Nothing is unpacked and no link is followed. Behind a damaged place the scan goes on with the next whole header, so that
damage costs no more than the members it touches. Sources: POSIX.1-2017, pax, "ustar Interchange Format" and "pax
Extended Header"; GNU tar manual, "Basic Tar Format" (long names, base-256 numbers).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
"""Headers and contents begin at multiples of this many bytes."""

_BUFFER = 16_384  # bytes read at once: the small members of an utterance lie together
_SEARCH = 1 << 20  # bytes read at once in search of the next header
_LONGEST_EXTENSION = 1 << 20  # bytes of names and records that belong to the next header
_ZEROS = bytes(BLOCK)
_MAGIC, _MAGIC_PLACE = b"ustar", 257
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

_FILE, _OLD_FILE, _CONTIGUOUS, _FOLDER, _SPARSE = b"0", b"\0", b"7", b"5", b"S"
_NOT_STORED = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe"}
_GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_EXTENSIONS = (_GNU_NAME, _GNU_LINK, _PAX, _PAX_GLOBAL)
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


class File(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    """Place of its first byte."""
    length: int


class Damage(NamedTuple):
    """What is wrong with a member, or with the tar where ``name`` is empty."""

    name: str
    reason: str


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


def scan(path: str) -> Iterator[File | Damage]:
    """Give every regular file of a tar whose name stays inside a folder, and what is wrong with the rest, in order.

    Raises:
        OSError: the tar cannot be opened or read.
    """
    with open(path, "rb", buffering=_BUFFER) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(BLOCK)
        if packing := next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), ""):
            yield Damage("", f"it is compressed ({packing}), and no place in it can be read by itself; unpack it")
        elif not size:
            yield Damage("", "it is empty (0 bytes)")
        elif start.strip(b"\0") and _parse(start) is None and _next_header(file, 0, size) == size:
            yield Damage("", "it is no tar")
        else:
            yield from _walk(file, size)


def _walk(file: BinaryIO, size: int) -> Iterator[File | Damage]:
    """Go from header to header."""
    place = 0
    extension: dict[bytes, bytes] = {}  # what stands before a header and belongs to it
    while place < size:
        block = _read(file, place, BLOCK)
        if block == _ZEROS[: len(block)]:
            behind = _behind_zeros(file, place, size)
            if behind < size:
                yield Damage("", f"zeros stand where a header should be, from byte {place} to {behind}")
            place, extension = behind, {}
            if place == size:
                return
            continue
        header = _parse(block)
        if header is None:
            behind = _next_header(file, place + BLOCK, size)
            yield Damage("", f"the header at byte {place} is damaged; {behind - place} bytes are passed over")
            place, extension = behind, {}
            continue
        data = place + BLOCK
        length = int(extension.get(b"size", header.size))
        stored = 0 if header.kind in _NOT_STORED else length
        if data + stored > size:
            name = extension.get(b"path", header.name).decode("utf-8", "replace")
            yield Damage(name, f"{max(0, size - data)} of {stored} bytes are there: the tar is cut off or damaged")
            place, extension = _next_header(file, data, size), {}
            continue
        place = data + -(-stored // BLOCK) * BLOCK
        if header.kind in _EXTENSIONS:
            extension |= _extend(header.kind, _read(file, data, min(length, _LONGEST_EXTENSION)))
            continue
        if member := _member(header, extension, data, length):
            yield member
        extension = {}
    yield Damage("", "its end mark is missing: members behind the last one may have been cut off")


def _member(header: _Header, extension: dict[bytes, bytes], data: int, length: int) -> File | Damage | None:
    """Tell what a header stands for; nothing for a folder."""
    raw = extension.get(b"path", header.name)
    name = raw.decode("utf-8", "replace").removeprefix("./")
    if header.kind in _NOT_STORED:
        return Damage(name, f"it is a {_NOT_STORED[header.kind]}; only files are read, and nothing is followed")
    if header.kind == _FOLDER or raw.endswith(b"/"):
        return None
    if header.kind == _SPARSE or any(key.startswith(b"GNU.sparse") for key in extension):
        return Damage(name, "it is a sparse file, which does not lie in one place; pack it anew")
    if header.kind not in (_FILE, _OLD_FILE, _CONTIGUOUS):
        return Damage(name, f"it is of the unknown kind {header.kind!r}")
    if name.encode("utf-8", "replace") != raw.removeprefix(b"./") or "\0" in name:
        return Damage(name, "its name is no UTF-8")
    if name.startswith("/") or ".." in name.split("/"):
        return Damage(name, "its name leads out of the folder; only plain names are taken")
    return File(name, data, length)


def _parse(block: bytes) -> _Header | None:
    """Read a header; ``None`` where the checksum or a number is wrong."""
    if len(block) < BLOCK:
        return None
    checksum, size = _number(block[148:156]), _number(block[124:136])
    if checksum is None or size is None:
        return None
    plain = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if checksum != plain:
        return None
    name = block[:100].partition(b"\0")[0]
    # GNU tar keeps times where POSIX has the beginning of a long name
    prefix = block[345:500].partition(b"\0")[0] if block[257:265] == b"ustar\x0000" else b""
    return _Header(prefix + b"/" + name if prefix else name, size, block[156:157])


def _number(field: bytes) -> int | None:
    """Read an octal number, or a base-256 one; ``None`` where it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else None


def _extend(kind: bytes, content: bytes) -> dict[bytes, bytes]:
    """Read what an extended header says about the next member."""
    if kind == _GNU_NAME:
        return {b"path": content.rstrip(b"\0")}
    if kind != _PAX:
        return {}
    records, place = {}, 0
    while match := _PAX_RECORD.match(content, place):
        end = place + int(match[1])
        records[match[2]] = content[match.end() : end - 1]
        place = max(end, match.end())
    if not records.get(b"size", b"0").isdigit():
        del records[b"size"]
    return records


def _behind_zeros(file: BinaryIO, place: int, size: int) -> int:
    """Return the place of the first block behind ``place`` that is not all zeros, or ``size``."""
    while place < size:
        rest = _read(file, place, _SEARCH)
        if kept := rest.lstrip(b"\0"):
            return place + (len(rest) - len(kept)) // BLOCK * BLOCK
        place += len(rest)
    return size


def _next_header(file: BinaryIO, place: int, size: int) -> int:
    """Return the place of the first whole header from ``place`` on, or ``size``."""
    place = min(size, -(-place // BLOCK) * BLOCK)
    while place < size:
        rest = _read(file, place, _SEARCH + BLOCK)
        magic = rest.find(_MAGIC)
        while magic >= 0:
            start = magic - _MAGIC_PLACE
            if start % BLOCK == 0 and start >= 0 and _parse(rest[start : start + BLOCK]) is not None:
                return place + start
            magic = rest.find(_MAGIC, magic + 1)
        place += _SEARCH
    return size


def _read(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)
