"""A file inside a tar, read by its place: no search through the tar, no copy of it unpacked."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

_OPEN_TARS = 128  # a process may hold 1024 descriptors on many systems, and the loader needs some


class TarMember(NamedTuple):
    """Where a file lies inside a tar."""

    tar: str
    """Path of the tar."""
    name: str
    """Name of the member, ``<key>.wav``."""
    offset: int
    """Place of its first byte within the tar."""
    length: int
    """Bytes."""

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"

    def read(self, start: int = 0, count: int | None = None) -> bytes:
        """Read ``count`` bytes from ``start``, or all that follow; fewer where the tar or the member ends.

        Raises:
            OSError: the tar cannot be read.
        """
        rest = max(0, self.length - start)
        handle = _handle(self.tar)
        return os.pread(handle.descriptor, rest if count is None else min(count, rest), self.offset + start)


class _Handle:
    """An open file that closes when its last user lets go of it, which may be after the cache did."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(_OPEN_TARS)
def _handle(path: str) -> _Handle:
    return _Handle(path)
