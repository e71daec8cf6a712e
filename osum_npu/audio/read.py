"""Sound files, bytes and streams to 16 kHz mono samples. What cannot be read is told in words."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

Source: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO

SAMPLE_RATE = 16_000
"""Samples per second of everything behind this module."""

MINIMUM_SECONDS = 201 / SAMPLE_RATE
"""The first analysis window is filled by reflecting half a window, 200 samples, which takes one sample more."""

LOWEST_RATE = 8_000
"""The telephone's rate, the lowest that speech is recorded at: what claims less has a wrong header, or lacks the upper
formants that tell vowels and consonants apart."""

ROUNDING_SECONDS = 0.01
"""One feature frame: how far an ``end`` may pass the end of its file, for manifests round their times."""

LOUDEST = 8.0
"""Decoders and resampling overshoot full scale (1.0) by a little; what is louder was never scaled to [-1, 1]."""

_UNKNOWN_LENGTH = 2**62  # libsndfile gives 2^63 - 1 where a header leaves the length open
_STREAMED = 0x7FFF0000  # writers into a pipe put 0x7FFFF000 or 0xFFFFFFFF where the size would stand
_SHORT_CHUNK = re.compile(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", re.MULTILINE)
_LARGEST_OGG_PAGE = 27 + 255 + 255 * 255


class AudioError(ValueError):
    """A sound cannot be read; the message names the file and the reason."""


@dataclass(frozen=True)
class AudioInfo:
    """What the header of a sound file says."""

    seconds: float
    sample_rate: int
    channels: int
    format: str
    """Container and coding in libsndfile's terms: ``WAV PCM_16``, ``OGG OPUS``."""


def read_audio(
    source: Source, start: float = 0.0, end: float | None = None, *, max_seconds: float | None = None
) -> NDArray[np.float32]:
    """Read a sound, or a span of it, as 16 kHz mono.

    Channels are averaged; other rates are resampled by soxr (HQ). Silence is returned as it is.

    Args:
        source: path, content, or binary file object (read from its position to its end) of a wav, flac, mp3, ogg
            (vorbis or opus) or other file that libsndfile reads.
        start: first second wanted.
        end: last second wanted; ``None`` means the end of the file.
        max_seconds: a longer span is refused before it is decoded.

    Returns:
        float32 samples in [-1, 1], shape ``(samples,)``, at least 201.

    Raises:
        AudioError: the source is missing, empty, no sound, cut off or broken, or its rate is below ``LOWEST_RATE``;
            the span lies outside the sound, is shorter than ``MINIMUM_SECONDS`` or longer than ``max_seconds``; or a
            sample is not finite or far beyond full scale.
    """
    with _opened(source) as (name, file):
        rate = file.samplerate
        if rate < LOWEST_RATE:
            raise _error(name, f"its rate is {rate} Hz; speech needs at least {LOWEST_RATE} Hz")
        first, stop = _span(name, file, start, end)
        seconds = (stop - first) / rate
        if seconds < MINIMUM_SECONDS:
            raise _error(name, f"{seconds:.4f} s is too short; at least {MINIMUM_SECONDS:.4f} s are needed")
        if max_seconds is not None and seconds > max_seconds:
            raise _error(name, f"{seconds:.1f} s is longer than the allowed {max_seconds:g} s")
        file.seek(first)
        samples: NDArray[np.float32] = file.read(stop - first, dtype="float32", always_2d=True)
    if len(samples) < stop - first:
        raise _error(name, f"{len(samples)} of {stop - first} samples are there: the file is cut off or broken")
    peak = np.abs(samples).max()  # NaN wherever a sample is NaN
    if not np.isfinite(peak):
        raise _error(name, f"{np.count_nonzero(~np.isfinite(samples))} samples are NaN or infinite")
    if peak > LOUDEST:
        raise _error(name, f"samples reach {peak:g} where full scale is 1; the file is broken or was not scaled")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    return np.clip(mono, -1.0, 1.0)


def probe(source: Source) -> AudioInfo:
    """Read length, rate, channels and format from the header alone.

    Raises:
        AudioError: the source is missing, empty, no sound, holds no samples, or is seen to be cut off.
    """
    with _opened(source) as (_, file):
        return AudioInfo(file.frames / file.samplerate, file.samplerate, file.channels, f"{file.format} {file.subtype}")


def _error(name: str, reason: str) -> AudioError:
    return AudioError(f"cannot read {name}: {reason}")


@contextmanager
def _opened(source: Source) -> Iterator[tuple[str, soundfile.SoundFile]]:
    """Give the name for messages and the opened file; faults inside the block come out as AudioError."""
    stream: io.BytesIO | io.FileIO
    if isinstance(source, bytes):
        name, stream = "the given bytes", io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        try:
            stream = open(source, "rb", buffering=0)  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise _error(name, getattr(error, "strerror", None) or str(error)) from error
    else:
        name, stream = str(getattr(source, "name", None) or "the given stream"), io.BytesIO(source.read())
    try:
        if stream.seek(0, os.SEEK_END) == 0:
            raise _error(name, "it is empty (0 bytes)")
        if _ends_inside_ogg(stream):
            raise _error(name, "its last Ogg page is missing: the file is cut off")
        stream.seek(0)
        # libsndfile reads a descriptor without Python's lock, and without guessing the format from the file's name.
        handle = stream.fileno() if isinstance(stream, io.FileIO) else stream
        with soundfile.SoundFile(handle, closefd=False) as file:
            _check_header(name, file)
            yield name, file
    except (soundfile.SoundFileError, OSError, MemoryError, TypeError) as error:
        reason = str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".")
        formats = "wav, flac, mp3, ogg vorbis and opus can be read"
        raise _error(name, f"it is broken or in no known format ({reason}); {formats}") from error
    finally:
        stream.close()


def _check_header(name: str, file: soundfile.SoundFile) -> None:
    if file.frames == 0:
        raise _error(name, "it holds no samples")
    if file.frames >= _UNKNOWN_LENGTH:
        raise _error(name, "its header leaves the length open; write it anew to a file instead of a pipe")
    # libsndfile takes a wav or aiff that was cut off for a shorter one, and only its log tells.
    if chunk := _SHORT_CHUNK.search(file.extra_info):
        announced, found = int(chunk.group(1)), int(chunk.group(2))
        lost = file.frames * (announced / found - 1)
        if announced < _STREAMED and lost > ROUNDING_SECONDS * file.samplerate:
            raise _error(name, f"{found} of {announced} bytes of sound are there: the file is cut off")


def _ends_inside_ogg(stream: io.BytesIO | io.FileIO) -> bool:
    """Tell whether an Ogg stream lacks its last page (RFC 3533, section 6); libsndfile would read on silently."""
    stream.seek(0)
    if stream.read(4) != b"OggS":
        return False
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _LARGEST_OGG_PAGE))
    tail = stream.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:  # no header, or not marked as the end of the stream
        return True
    segments = page[26]
    return len(page) < 27 + segments + sum(page[27 : 27 + segments])


def _span(name: str, file: soundfile.SoundFile, start: float, end: float | None) -> tuple[int, int]:
    """Turn seconds into the first sample and the one after the last."""
    length = file.frames / file.samplerate
    stop = length if end is None else end
    if not (math.isfinite(start) and 0 <= start < length):
        raise _error(name, f"start {start:g} s lies outside the sound, which lasts {length:.3f} s")
    if not stop <= length + ROUNDING_SECONDS:  # also true of NaN
        raise _error(name, f"end {stop:g} s lies outside the sound, which lasts {length:.3f} s")
    if stop <= start:
        raise _error(name, f"end {stop:g} s does not lie after start {start:g} s")
    return round(start * file.samplerate), min(round(stop * file.samplerate), file.frames)
