"""SentencePiece's ``tokenizer.model`` as a tokenizer of the tokenizers library, without the sentencepiece library.

The file is one protobuf message, ``ModelProto`` of google/sentencepiece, src/sentencepiece_model.proto; what its fields
mean follows src/normalizer.cc, src/bpe_model.cc, src/unigram_model.cc and src/sentencepiece_processor.cc there.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPACE = "▁"
"""How pieces write a space."""
UNKNOWN_SURFACE = " ⁇ "
"""What the library writes for the unknown piece, where the file does not say otherwise."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_NEVER = -1e6
"""Score of what is in a unigram vocabulary for its id alone: any way around it is better."""


@dataclass(frozen=True)
class Piece:
    """One id of the vocabulary."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a ``tokenizer.model`` says."""

    pieces: list[Piece]
    algorithm: int
    byte_fallback: bool
    unknown_surface: str
    charsmap: bytes
    """Normalising rules, compiled; empty for none."""
    dummy_prefix: bool
    """Whether a text begins with a space that it does not have."""
    trim: bool
    """Whether spaces at both ends, and all but one of several, are dropped."""

    def texts(self, *kinds: int) -> list[str]:
        """List the pieces of these kinds, by id."""
        return [piece.text for piece in self.pieces if piece.kind in kinds]


def read_model(path: str | Path) -> SentencePieceModel:
    """Read a SentencePiece model file.

    Raises:
        ValueError: the file is missing or damaged, is none of SentencePiece, or uses what is not known here.
    """
    try:
        content = Path(path).read_bytes()
        messages: dict[int, dict[int, Any]] = {2: {}, 3: {}}
        pieces = []
        for number, value in _fields(content):
            if number == 1:
                fields = dict(_fields(value))
                score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
                pieces.append(Piece(fields[1].decode(), score, fields.get(3, _NORMAL)))
            elif number in messages:
                messages[number] |= dict(_fields(value))
    except (OSError, IndexError, KeyError, AttributeError, TypeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(
            f"{path} is no SentencePiece model that can be read: {type(error).__name__}: {error}; wanted the whole "
            "tokenizer.model of an LLM (a file of some hundred bytes is a pointer of git-lfs, not the file)"
        ) from error
    trainer, normalizer = messages[2], messages[3]
    model = SentencePieceModel(
        pieces,
        algorithm=trainer.get(3, _UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        unknown_surface=trainer[44].decode() if 44 in trainer else UNKNOWN_SURFACE,
        charsmap=normalizer.get(2, b""),
        dummy_prefix=bool(normalizer.get(3, 1)),
        trim=bool(normalizer.get(4, 1)),
    )
    if lacking := _unsupported(model, trainer, normalizer):
        raise ValueError(f"{path}: {lacking}; wanted a BPE or unigram model as LLMs have it")
    return model


def _unsupported(model: SentencePieceModel, trainer: dict[int, Any], normalizer: dict[int, Any]) -> str | None:
    """Say what of a model file this module does not know."""
    if not model.pieces:
        return "it has no pieces"
    if len(model.texts(_UNKNOWN)) != 1:
        return f"it has {len(model.texts(_UNKNOWN))} pieces for what is unknown"
    if model.algorithm not in (_UNIGRAM, _BPE):
        return "it splits by words or characters"
    if trainer.get(24, 0):
        return "it writes spaces behind words (treat_whitespace_as_suffix)"
    if not normalizer.get(5, 1):
        return "it does not write spaces as ▁ (escape_whitespaces is off)"
    if model.algorithm == _BPE and model.texts(_UNUSED):
        return "some of its pieces are unused, and BPE would have to split them again"
    return None


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protobuf message: int, or bytes."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield key >> 3, value
            continue
        if kind == 2:
            length, place = _varint(message, place)
        else:
            length = {1: 8, 5: 4}[kind]
        if place + length > len(message):
            raise IndexError("it ends too early")
        yield key >> 3, message[place : place + length]
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Read an integer of seven bits a byte; return it and the place behind it."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def convert(model: SentencePieceModel) -> Any:
    """Build a ``tokenizers.Tokenizer`` that gives the ids and texts that the sentencepiece library gives.

    User-defined pieces and those of control are special tokens. A call with ``split_special_tokens`` takes all of them
    for plain text; the library always takes those of control for it, and never those that are user-defined.

    Where it differs from the library: a text that is nothing but one user-defined piece has no space in front; a model
    that has compiled normalising rules may treat combining marks behind a character that these rules replace in another
    way; unigram scores are added up in float64, so another one of two equally good ways may win; what bytes that are no
    UTF-8 decode to.

    Args:
        model: of :func:`read_model`.

    Raises:
        ValueError: a user-defined piece would be changed by the rules of its own file.
    """
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer(_algorithm(model))
    tokenizer.pre_tokenizer, tokenizer.normalizer, tokenizer.decoder = (
        _splitter(model),
        _normalizer(model),
        _decoder(model),
    )
    marks = model.texts(_USER_DEFINED)
    if changed := [mark for mark in marks if tokenizer.normalizer.normalize_str(mark) != mark]:
        raise ValueError(f"the piece {changed[0]!r} is changed by the normalising rules of its own tokenizer.model")
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in model.texts(_CONTROL, _UNKNOWN)])
    tokenizer.add_special_tokens([AddedToken(mark, normalized=True) for mark in marks])
    return tokenizer


def _algorithm(model: SentencePieceModel) -> Any:
    from tokenizers import models

    unknown = [piece.kind for piece in model.pieces].index(_UNKNOWN)
    if model.algorithm == _UNIGRAM:
        scores = [(piece.text, piece.score if piece.kind == _NORMAL else _NEVER) for piece in model.pieces]
        return models.Unigram(scores, unk_id=unknown, byte_fallback=model.byte_fallback)
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    name = model.pieces[unknown].text
    return models.BPE(ids, _merges(model), unk_token=name, fuse_unk=True, byte_fallback=model.byte_fallback)


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """List every pair of pieces whose sum is a piece, the best piece first: what is merged is decided by its score."""
    normal = set(model.texts(_NORMAL))
    pieces = sorted((piece for piece in model.pieces if piece.kind == _NORMAL), key=lambda piece: -piece.score)
    ways = ((piece.text[:i], piece.text[i:]) for piece in pieces for i in range(1, len(piece.text)))
    return [(left, right) for left, right in ways if left in normal and right in normal]


def _splitter(model: SentencePieceModel) -> Any:
    """Return what cuts around characters that are in the names of special pieces and in no other.

    In a unigram model the bytes of such a character cost more than any piece, even one that should never win.
    """
    from tokenizers import Regex, pre_tokenizers

    special = {piece.text for piece in model.pieces} - set(model.texts(_NORMAL))
    strange = "".join(sorted(set("".join(special)) - set("".join(model.texts(_NORMAL)))))
    if model.algorithm == _BPE or not strange or not model.byte_fallback:
        return None
    return pre_tokenizers.Split(Regex(f"[{re.escape(strange)}]"), "isolated")


def _normalizer(model: SentencePieceModel) -> Any:
    from tokenizers import Regex, normalizers

    prefix: list[Any] = [normalizers.Prepend(" ")] if model.dummy_prefix else []
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if steps and steps[0].normalize_str("\r") == steps[0].normalize_str("\n"):
        steps.insert(0, normalizers.Replace("\r", "\n"))  # \r\n is one grapheme, of which they would make one space
    # \A and \z: to this library's regular expressions, ^ and $ are the ends of a line.
    if model.trim:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " "), *prefix]
    else:  # a text of nothing but characters that the rules drop has a prefix too
        steps = prefix + steps
    steps.append(normalizers.Replace(" ", SPACE))
    if model.trim:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    if model.dummy_prefix and (marks := model.texts(_USER_DEFINED)):
        # Added tokens are looked for in normalised text, by their own normalised form: so it must be bare.
        alone = "|".join(map(re.escape, marks))
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}(?=(?:{alone})\z)"), ""))
    return normalizers.Sequence(steps)


def _decoder(model: SentencePieceModel) -> Any:
    from tokenizers import decoders

    (unknown,) = model.texts(_UNKNOWN)
    steps: list[Any] = [decoders.Replace(unknown, model.unknown_surface), decoders.ByteFallback(), decoders.Fuse()]
    if model.dummy_prefix or model.trim:
        steps.append(decoders.Strip(SPACE, len(model.pieces) if model.trim else 1, 0))
    return decoders.Sequence([*steps, decoders.Replace(SPACE, " ")])
