"""Transcripts as the units that are scored: words, and single characters of Chinese."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache

from osum_npu.tasks import HAN, split_words

CHINESE = ("zh", "cmn", "yue")
"""Language codes whose transcripts are scored in characters (CER); all others are scored in words (WER)."""

_MARK = re.compile(r"<[^<>]*>")
_LETTER = rf"[^\W_{HAN}]"
_UNIT = re.compile(rf"[{HAN}]|{_LETTER}+(?:(?:'|(?<=\d)\.(?=\d)){_LETTER}+)*")

_RELEASE_PUNCTUATION = "!,?、。！，；？：「」︰『』《》"
_RELEASE_UNIT = re.compile(rf"[{HAN}]|<[!-=?-~]*>?|[^\s{HAN}{_RELEASE_PUNCTUATION}][!-~]*")
_RELEASE_MARK = re.compile(r"<[^>]*(?:>|$)")


def is_chinese(lang: str) -> bool:
    """Say whether ``lang`` (``zh``, ``zh-CN``, ``yue``) is scored in characters."""
    return _primary(lang) in CHINESE


def tokens(text: str, lang: str | None = None) -> list[str]:
    """Split ``text`` into the units that are scored, after removing what is no error to differ in.

    English goes through Whisper's normaliser (Radford et al. 2022, appendix C): case, punctuation, fillers,
    contractions, spelling and written numbers. Every other language, and text of unknown language, keeps its words and
    loses compatibility forms (NFKC), case and punctuation. A Han character is one unit in any language; other runs are
    words, so mixed text is scored in mixed units. ``<marks>`` are no part of the transcript.

    Args:
        text: a transcript.
        lang: language code; give reference and hypothesis the same one.

    Returns:
        Words and single Han characters.
    """
    if lang is not None and _primary(lang) == "en":
        return split_words(_english_normalizer()(text))
    folded = unicodedata.normalize("NFKC", _MARK.sub(" ", text)).replace("\u2019", "'").lower()
    return _UNIT.findall(folded)


def release_tokens(text: str) -> list[str]:
    """Split ``text`` as the scorer of the OSUM release does, for comparison with its published rates.

    That scorer is WeNet's ``compute-wer.py --char=1``: upper case, Han characters one by one, other runs up to a space
    or a non-ASCII character, ``<marks>`` removed. Of punctuation it drops a short list, and only where a unit would
    begin: ``hello,`` differs from ``hello``, and ``a.`` from ``a``.
    """
    units = (_RELEASE_MARK.sub("", unit) for unit in _RELEASE_UNIT.findall(text.upper()))
    return [unit for unit in units if unit]


def _primary(lang: str) -> str:
    """Return ``zh`` for ``zh-CN`` and ``zh_Hans``."""
    return re.split("[-_]", lang.lower())[0]


@cache
def _english_normalizer() -> Callable[[str], str]:
    # Importing any part of whisper imports all of it (1.5 s), which scoring Chinese need not wait for.
    from whisper.normalizers import EnglishTextNormalizer

    normalizer: Callable[[str], str] = EnglishTextNormalizer()
    return normalizer
