"""How transcripts are written: case and spaces."""

from __future__ import annotations

import re

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
"""The inside of a regular-expression class that matches one Han character."""

_AROUND_HAN = re.compile(rf"(?<=[{HAN}])\s+|\s+(?=[{HAN}])")
_AROUND_MARK = re.compile(r"\s*([<>])\s*")
_UNIT = re.compile(rf"[{HAN}]|[^\s{HAN}]+")


def normalize_text(text: str, *, lower: bool = True) -> str:
    """Write ``text`` as OSUM's data does: lower case, no space around Han characters nor around ``<`` and ``>``.

    The rule follows the vectors ``process_text`` recorded from ASLP-lab/OSUM. OSUM-Pangu keeps the case of all but pure
    transcripts (vectors ``process_text2``): ``lower`` is off.
    """
    text = _AROUND_MARK.sub(r"\1", _AROUND_HAN.sub("", text))
    return text.lower() if lower else text


def split_words(text: str) -> list[str]:
    """Split into what a time stamp is given for: English words and single Han characters."""
    return _UNIT.findall(text)


def join_words(words: list[str]) -> str:
    """Undo :func:`split_words`: spaces between words, none around Han characters."""
    return normalize_text(" ".join(words), lower=False).strip()
