"""Whisper's log-mel spectrogram, batched, on any device.

Shapes: B utterances, S samples, T frames of 10 ms, F frames of all utterances, end to end, N samples of a window,
M mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from osum_npu import packing

N_FFT = 400
"""Window of 25 ms at 16 kHz."""
HOP = 160
"""10 ms at 16 kHz."""


@cache
def mel_filters(n_mels: int, device: torch.device) -> Tensor:
    """Return Whisper's Slaney mel filters as float32 ``[M, N_FFT // 2 + 1]``, read from openai-whisper's own file.

    Raises:
        ValueError: openai-whisper has no filters for this number of bins.
    """
    # find_spec, because importing whisper costs more than a second
    spec = find_spec("whisper")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("log-mel filters come with the package openai-whisper: pip install openai-whisper")
    with np.load(Path(spec.submodule_search_locations[0]) / "assets" / "mel_filters.npz") as table:
        if f"mel_{n_mels}" not in table:
            raise ValueError(f"Whisper has log-mel filters of 80 and 128 bins, not {n_mels}")
        return torch.from_numpy(table[f"mel_{n_mels}"]).to(device)


@cache
def _window(device: torch.device) -> Tensor:
    return torch.hann_window(N_FFT, device=device)


def frame_count(samples: int) -> int:
    """Return the number of 10 ms frames that :func:`log_mel` makes of ``samples``."""
    return samples // HOP


def log_mel(wave_BS: Tensor, samples: Sequence[int], n_mels: int = 80) -> Tensor:
    """Compute the log-mel spectrogram of every utterance as if it were alone.

    Periodic Hann window, centred with reflection at the utterance's own end (not at the batch's), last frame dropped,
    power spectrum, clamp 1e-10, log10, floor at the utterance's maximum − 8, ``(x + 4) / 4``. Nothing is computed for
    frames behind an end.
    Source: openai/whisper, whisper/audio.py.

    Args:
        wave_BS: float32 waveforms of 16 kHz, padded on the right with anything; there may be none.
        samples: true length of each, at least 160.
        n_mels: 80 or 128.

    Returns:
        float32 ``[B, T, M]`` with :func:`frame_count` frames of each utterance, and zeros behind.
    """
    if not samples:
        return wave_BS.new_zeros(0, 0, n_mels)
    device, half, longest = wave_BS.device, N_FFT // 2, int(wave_BS.shape[1]) // HOP
    ends_B1 = torch.tensor(samples).to(device, non_blocking=True)[:, None]
    padded = F.pad(wave_BS.float(), (half, half))
    # Only what lies around the ends is reflected: half a window before the start and behind the end of each.
    before, behind = torch.arange(-half, 0, device=device), torch.arange(half, device=device)
    edge_BE = torch.cat([before.expand(len(samples), -1), ends_B1 + behind], dim=1)
    mirrored_BE = torch.minimum(edge_BE.abs(), 2 * (ends_B1 - 1) - edge_BE.abs()).clamp(min=0)
    padded.scatter_(1, edge_BE + half, wave_BS.float().gather(1, mirrored_BE))
    places = packing.padded([frame_count(n) for n in samples], longest, device)
    utterance_F, frame_F = places.index_T // longest, places.index_T % longest
    with torch.autocast(device.type, enabled=False):
        windows_FN = padded.unfold(1, N_FFT, HOP)[utterance_F, frame_F] * _window(device)
        spectrum = torch.fft.rfft(windows_FN)
        power_FQ = spectrum.real.square() + spectrum.imag.square()
        log_FM = (power_FQ @ mel_filters(n_mels, device).T).clamp(min=1e-10).log10()
    peak_B = log_FM.new_full((places.count, n_mels), float("-inf")).index_copy(0, places.index_T, log_FM)
    peak_B = peak_B.view(len(samples), -1).amax(1)
    scaled_FM = (torch.maximum(log_FM, peak_B[utterance_F, None] - 8.0) + 4.0) / 4.0
    return places.spread(scaled_FM).view(len(samples), longest, n_mels)
