"""Text files of one name or one pair a line: lists of shards, Kaldi's tables."""

from __future__ import annotations

import os
from collections.abc import Iterator

from osum_npu.data.entry import Fault


def read_lines(path: str) -> Iterator[tuple[int, str] | Fault]:
    """Give the lines of a UTF-8 file with their numbers, without blanks around them; empty lines are passed over.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                reason = f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is no UTF-8"
                yield Fault(path, number, "", reason)
                continue
            if "\0" in text:
                yield Fault(path, number, "", "the line holds null bytes; the file is damaged or no text")
            elif text:
                yield number, text


def beside(folder: str, name: str) -> str:
    """Return the path that a list in ``folder`` means by ``name``.

    A relative name starts from the list's folder, as in all manifests, or from the current folder, as OSUM's and
    Kaldi's own scripts write it; the first that exists counts.
    """
    path = os.path.join(folder, name)
    return name if not os.path.exists(path) and os.path.exists(name) else path
