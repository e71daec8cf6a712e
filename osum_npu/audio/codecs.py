"""m4a and wma, which libsndfile does not know, decoded by FFmpeg through PyAV (the extra ``codecs``)."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

_LOST_SECONDS = 0.1  # by which a whole file may be shorter than its header says: encoders round to frames
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")  # identifier of the ASF header object, which begins wma


def needs_codecs(head: bytes) -> bool:
    """Tell whether a file that begins like this is an MP4 (m4a) or an ASF (wma)."""
    return head[4:8] == b"ftyp" or head.startswith(_ASF)


def decode(data: bytes) -> tuple[NDArray[np.float32], int, str]:
    """Decode the first sound of a file.

    Returns:
        (samples of shape ``(frames, channels)``, samples a second, container and coding).

    Raises:
        ValueError: PyAV is not installed, or the file cannot be decoded whole.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError("m4a and wma need the extra codecs: pip install 'osum-npu[codecs]'") from error
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.audio:
                raise ValueError("it holds no sound")
            stream = container.streams.audio[0]
            rate, format_ = stream.codec_context.sample_rate, f"{container.format.name} {stream.codec_context.name}"
            resampler = av.AudioResampler(format="fltp")
            parts = [
                part.to_ndarray().T for frame in [*container.decode(stream), None] for part in resampler.resample(frame)
            ]
            announced = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    except av.FFmpegError as error:
        raise ValueError(f"it is broken or cut off ({error.strerror or error})") from error
    samples = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
    if len(samples) / rate < announced - _LOST_SECONDS:
        raise ValueError(f"{len(samples) / rate:.2f} of {announced:.2f} s are there: the file is cut off or broken")
    return np.ascontiguousarray(samples, np.float32), rate, format_
