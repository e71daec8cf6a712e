"""Sound files, bytes and streams to 16 kHz mono samples. What cannot be read is told in words."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from osum_npu.audio import codecs, wav
from osum_npu.audio.tar_member import TarMember

Source: TypeAlias = str | os.PathLike[str] | TarMember | bytes | BinaryIO

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


@dataclass(frozen=True)
class _Content:
    """The bytes of a source."""

    name: str
    """For messages."""
    size: int
    read: Callable[[int, int], bytes]
    """``read(start, count)``; fewer bytes where the content ends."""
    descriptor: int | None = None
    """Of a file that holds nothing else."""


@dataclass(frozen=True)
class _Sound:
    """An opened sound: its header, and how to decode it."""

    name: str
    sample_rate: int
    channels: int
    frames: int
    format: str
    read: Callable[[int, int], NDArray[np.float32]]
    """``read(first, stop)`` in frames gives ``[frames, channels]``; fewer frames where the file is broken."""


def read_audio(
    source: Source, start: float = 0.0, end: float | None = None, *, max_seconds: float | None = None
) -> NDArray[np.float32]:
    """Read a sound, or a span of it, as 16 kHz mono.

    Channels are averaged; other rates are resampled by soxr (HQ). Silence is returned as it is.

    Args:
        source: path, member of a tar, content, or binary file object (read from its position to its end) of a wav,
            flac, mp3, ogg (vorbis or opus) or other file that libsndfile reads; with the extra ``codecs`` also of an
            m4a or wma.
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
    samples, rate = read_samples(source, start, end, max_seconds=max_seconds)
    mono: NDArray[np.float32] = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    return mono.clip(-1.0, 1.0, out=mono)


def read_samples(
    source: Source, start: float = 0.0, end: float | None = None, *, max_seconds: float | None = None
) -> tuple[NDArray[np.float32], int]:
    """Read a sound, or a span of it, with the rate and the channels it has; otherwise as :func:`read_audio`.

    Returns:
        (float32 samples of shape ``(frames, channels)``, samples a second).

    Raises:
        AudioError: as :func:`read_audio`.
    """
    with _opened(source) as sound:
        name, rate = sound.name, sound.sample_rate
        if rate < LOWEST_RATE:
            raise _error(name, f"its rate is {rate} Hz; speech needs at least {LOWEST_RATE} Hz")
        first, stop = _span(sound, start, end)
        seconds = (stop - first) / rate
        if seconds < MINIMUM_SECONDS:
            raise _error(name, f"{seconds:.4f} s is too short; at least {MINIMUM_SECONDS:.4f} s are needed")
        if max_seconds is not None and seconds > max_seconds:
            raise _error(name, f"{seconds:.1f} s is longer than the allowed {max_seconds:g} s")
        samples = sound.read(first, stop)
    if len(samples) < stop - first:
        raise _error(name, f"{len(samples)} of {stop - first} samples are there: the file is cut off or broken")
    low, high = samples.min(), samples.max()  # NaN where a sample is NaN
    if not (np.isfinite(low) and np.isfinite(high)):
        raise _error(name, f"{np.count_nonzero(~np.isfinite(samples))} samples are NaN or infinite")
    if (peak := max(-low, high)) > LOUDEST:
        raise _error(name, f"samples reach {peak:g} where full scale is 1; the file is broken or was not scaled")
    return samples, rate


def probe(source: Source) -> AudioInfo:
    """Read length, rate, channels and format, from the header alone where the format has one.

    Raises:
        AudioError: the source is missing, empty, no sound, holds no samples, or is seen to be cut off.
    """
    with _opened(source) as sound:
        return AudioInfo(sound.frames / sound.sample_rate, sound.sample_rate, sound.channels, sound.format)


def _error(name: str, reason: str) -> AudioError:
    return AudioError(f"cannot read {name}: {reason}")


@contextmanager
def _content(source: Source) -> Iterator[_Content]:
    """Give the bytes of a source."""
    if isinstance(source, TarMember):
        yield _Content(str(source), source.length, source.read)
    elif isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        try:
            file = open(source, "rb", buffering=0)  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise _error(name, getattr(error, "strerror", None) or str(error)) from error
        with file:
            descriptor = file.fileno()
            size = os.fstat(descriptor).st_size
            yield _Content(name, size, lambda start, count: os.pread(descriptor, count, start), descriptor)
    elif isinstance(source, bytes):
        yield _Content("the given bytes", len(source), lambda start, count: source[start : start + count])
    else:
        name, data = str(getattr(source, "name", None) or "the given stream"), source.read()
        yield _Content(name, len(data), lambda start, count: data[start : start + count])


@contextmanager
def _opened(source: Source) -> Iterator[_Sound]:
    """Give the opened sound; faults inside the block come out as AudioError."""
    with _content(source) as content:
        try:
            if content.size == 0:
                raise _error(content.name, "it is empty (0 bytes)")
            head = content.read(0, wav.HEAD)
            if plain := wav.plain_wav(head, content.size):
                yield _plain(content, plain)
            elif codecs.needs_codecs(head):
                yield _by_ffmpeg(content)
            elif head[:4] == b"OggS" and _ends_inside_ogg(content):
                raise _error(content.name, "its last Ogg page is missing: the file is cut off")
            else:
                # libsndfile reads a descriptor without Python's lock, and does not guess the format from a name.
                handle = content.descriptor
                stream = handle if handle is not None else io.BytesIO(content.read(0, content.size))
                with soundfile.SoundFile(stream, closefd=False) as file:
                    yield _by_libsndfile(content.name, file)
        except OSError as error:
            raise _error(content.name, error.strerror or str(error)) from error
        except (soundfile.SoundFileError, MemoryError, TypeError) as error:
            reason = str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".")
            formats = "wav, flac, mp3, ogg vorbis and opus can be read, and m4a and wma with the extra codecs"
            raise _error(content.name, f"it is broken or in no known format ({reason}); {formats}") from error


def _plain(content: _Content, header: wav.PlainWav) -> _Sound:
    frame = 2 * header.channels

    def read(first: int, stop: int) -> NDArray[np.float32]:
        return wav.decode(content.read(header.start + first * frame, (stop - first) * frame), header.channels)

    return _Sound(content.name, header.sample_rate, header.channels, header.frames, "WAV PCM_16", read)


def _by_ffmpeg(content: _Content) -> _Sound:
    try:
        samples, rate, format_ = codecs.decode(content.read(0, content.size))
    except ValueError as error:
        raise _error(content.name, str(error)) from error
    if not len(samples):
        raise _error(content.name, "it holds no samples")
    return _Sound(content.name, rate, samples.shape[1], len(samples), format_, lambda first, stop: samples[first:stop])


def _by_libsndfile(name: str, file: soundfile.SoundFile) -> _Sound:
    _check_header(name, file)

    def read(first: int, stop: int) -> NDArray[np.float32]:
        file.seek(first)
        samples: NDArray[np.float32] = file.read(stop - first, dtype="float32", always_2d=True)
        return samples

    return _Sound(name, file.samplerate, file.channels, file.frames, f"{file.format} {file.subtype}", read)


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


def _ends_inside_ogg(content: _Content) -> bool:
    """Tell whether an Ogg stream lacks its last page (RFC 3533, section 6); libsndfile would read on silently."""
    tail = content.read(max(0, content.size - _LARGEST_OGG_PAGE), _LARGEST_OGG_PAGE)
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:  # no header, or not marked as the end of the stream
        return True
    segments = page[26]
    return len(page) < 27 + segments + sum(page[27 : 27 + segments])


def _span(sound: _Sound, start: float, end: float | None) -> tuple[int, int]:
    """Turn seconds into the first sample and the one after the last."""
    length = sound.frames / sound.sample_rate
    stop = length if end is None else end
    if not (math.isfinite(start) and 0 <= start < length):
        raise _error(sound.name, f"start {start:g} s lies outside the sound, which lasts {length:.3f} s")
    if not stop <= length + ROUNDING_SECONDS:  # also true of NaN
        raise _error(sound.name, f"end {stop:g} s lies outside the sound, which lasts {length:.3f} s")
    if stop <= start:
        raise _error(sound.name, f"end {stop:g} s does not lie after start {start:g} s")
    return round(start * sound.sample_rate), min(round(stop * sound.sample_rate), sound.frames)
