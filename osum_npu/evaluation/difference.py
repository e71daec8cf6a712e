"""Where an answer as text differs from its reference, for people to see."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from osum_npu.evaluation.error_rate import align
from osum_npu.evaluation.text import tokens
from osum_npu.tasks import HAN

_PIECE = re.compile(rf"<[^<>]*>|[{HAN}]|\s+|[^\s<{HAN}]+|<")
_TIME = re.compile(r"<(\d+(?:\.\d+)?)>")


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer: a word, a Han character, a ``<mark>``, a time or white space."""

    text: str
    key: str = ""
    """What it is compared by; empty for what is not compared: times, punctuation and white space."""
    time: bool = False
    differs: bool = False


def differences(reference: str, hypothesis: str) -> tuple[list[Piece], list[Piece]]:
    """Cut both answers into pieces and mark those that have no equal in the other.

    Differences that scoring forgives (case, punctuation) are not marked. Times are cut out, without their brackets,
    but not compared: they seldom agree to the last digit.
    """
    pieces = _cut(reference), _cut(hypothesis)
    places = [[i for i, piece in enumerate(side) if piece.key] for side in pieces]
    keys = [[side[i].key for i in kept] for side, kept in zip(pieces, places, strict=True)]
    for span in align(*keys):
        if not span.equal:
            for side, kept, where in zip(pieces, places, (span.reference, span.hypothesis), strict=True):
                for i in kept[where]:
                    side[i] = replace(side[i], differs=True)
    return pieces


def _cut(text: str) -> list[Piece]:
    pieces = []
    for piece in _PIECE.findall(text):
        if time := _TIME.fullmatch(piece):
            pieces.append(Piece(time.group(1), time=True))
        elif piece.startswith("<"):
            pieces.append(Piece(piece, key=piece.lower()))
        else:
            pieces.append(Piece(piece, key=" ".join(tokens(piece))))
    return pieces
