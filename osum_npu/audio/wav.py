"""The plainest wav file, 16-bit PCM with nothing odd about it, decoded straight from its bytes.

Most speech corpora are of this form, and libsndfile spends several times longer on opening such a file than numpy on
decoding it. Every other file, an unusual or damaged wav among them, is left to libsndfile.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HEAD = 512
"""Bytes from the start of a file that :func:`plain_wav` wants to see."""

_SCALE = np.float32(1 / 32768)
_RATES = range(1000, 400_000)
_CHANNELS = range(1, 9)


@dataclass(frozen=True)
class PlainWav:
    """Where the samples of a plain wav file lie."""

    sample_rate: int
    channels: int
    frames: int
    start: int
    """Place of the first sample, in bytes."""


def plain_wav(head: bytes, size: int) -> PlainWav | None:
    """Find the samples of a file that is a 16-bit PCM wav in all respects.

    Every length has to fit: RIFF ends with the file, the samples end with RIFF, one format chunk comes first and
    nothing but a list of notes stands between. Source: RIFF and WAVE, "Multimedia Programming Interface and Data
    Specifications 1.0" (IBM and Microsoft, 1991).

    Args:
        head: the first :data:`HEAD` bytes of the file, or all of a shorter one.
        size: length of the file in bytes.

    Returns:
        ``None`` for any other file.
    """
    if head[:4] != b"RIFF" or head[8:16] != b"WAVEfmt " or len(head) < 44:
        return None
    riff_size, format_size = struct.unpack_from("<I8xI", head, 4)
    coding, channels, rate, byte_rate, align, bits = struct.unpack_from("<HHIIHH", head, 20)
    if (riff_size, format_size, coding, bits, align, byte_rate) != (size - 8, 16, 1, 16, 2 * channels, align * rate):
        return None
    place = _behind_info(head, 36)
    if head[place : place + 4] != b"data" or len(head) < place + 8:
        return None
    length = int.from_bytes(head[place + 4 : place + 8], "little")
    if rate not in _RATES or channels not in _CHANNELS or place + 8 + length != size or not length or length % align:
        return None
    return PlainWav(rate, channels, length // align, place + 8)


def _behind_info(head: bytes, place: int) -> int:
    """Return the place behind a list of notes such as the writer's name, where a whole one stands at ``place``."""
    if head[place : place + 4] != b"LIST" or head[place + 8 : place + 12] != b"INFO":
        return place
    end = place + 8 + int.from_bytes(head[place + 4 : place + 8], "little")
    note = place + 12
    while note + 8 <= end <= len(head) and head[note : note + 4].isalpha() and head[note : note + 4].isupper():
        length = int.from_bytes(head[note + 4 : note + 8], "little")
        if not length:
            break
        note += 8 + length + length % 2
    return end if note == end else place


def decode(data: bytes, channels: int) -> NDArray[np.float32]:
    """Scale 16-bit samples to [-1, 1); the result is exact, and the same to the bit as libsndfile's.

    Args:
        data: little-endian samples, channels side by side; an incomplete last frame is left out.
        channels: samples a frame.

    Returns:
        float32, shape ``(frames, channels)``.
    """
    whole = len(data) - len(data) % (2 * channels)
    samples = np.frombuffer(data, "<i2", whole // 2).astype(np.float32)
    samples *= _SCALE
    return samples.reshape(-1, channels)
