"""JSONL: one JSON object a line, in UTF-8."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from osum_npu.data.entry import Entry, Fault

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_jsonl(path: str) -> Iterator[Entry | Fault]:
    """Give the decoded lines of a file and what is wrong with the others; empty lines are passed over.

    Raises:
        OSError: the file cannot be read.
    """
    folder = os.path.dirname(path)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(_UTF16_MARKS):
                yield Fault(path, number, "", "the file is in UTF-16; save it as UTF-8")
                return
            if number == 1 and line.startswith(_UTF8_MARK):
                yield Fault(path, number, "", "the file begins with a byte-order mark; save it as UTF-8 without one")
                line = line.removeprefix(_UTF8_MARK)
            if not line.strip():
                continue
            if b"\0" in line:
                reason = f"the line holds {line.count(0)} null bytes; the file is damaged or no text"
                yield Fault(path, number, "", reason)
                continue
            try:
                yield Entry(path, number, json.loads(line.decode()), folder)
            except UnicodeDecodeError as error:
                reason = f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is no UTF-8"
                yield Fault(path, number, "", reason)
            except (ValueError, RecursionError) as error:
                yield Fault(path, number, "", f"no JSON: {error}")
