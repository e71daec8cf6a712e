import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper.audio import log_mel_spectrogram

from osum_npu.audio.mel import frame_count, log_mel
from osum_npu.parity import relative_error

SHORTEST = 201  # half a window is reflected at both ends


def voice(samples, seed=0):
    """Harmonics of a rising pitch under a slow envelope, with noise; of a loudness and a clearness of its own."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16000
    phase = 2 * np.pi * (rng.uniform(90, 300) * t + 50 * t**2)
    envelope = np.sin(2 * np.pi * 1.7 * t + rng.uniform(0, 6)) ** 2
    harmonics = sum(0.3 / k * np.sin(k * phase) for k in (1, 2, 3, 5, 8))
    loudness, noise = 10 ** rng.uniform(-4, 0), 10 ** rng.uniform(-6, -2)
    return torch.from_numpy(loudness * (envelope * harmonics + noise * rng.normal(size=samples))).float()


def original(wave, n_mels=80):
    return log_mel_spectrogram(wave, n_mels).T


def alone(wave, n_mels=80):
    features = log_mel(wave[None], [len(wave)], n_mels)
    assert features.shape == (1, frame_count(len(wave)), n_mels)
    return features[0]


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("samples", [SHORTEST, 319, 320, 16000, 16001, 47999])
def test_equals_whisper(samples, n_mels):
    wave = voice(samples)
    features = alone(wave, n_mels)
    assert features.dtype is torch.float32
    assert relative_error(features, original(wave, n_mels)) <= 1e-5


def test_silence_is_the_lowest_value():
    features = alone(torch.zeros(5000))
    assert torch.equal(features, original(torch.zeros(5000)))
    assert features.unique().tolist() == [-1.5]


def test_what_is_quiet_is_cut_off_at_80_db_below_the_loudest():
    loud = voice(8000)
    wave = torch.cat([loud / loud.abs().max(), 1e-7 * voice(8000, seed=1)])
    features = alone(wave)
    assert relative_error(features, original(wave)) <= 1e-5
    assert features.min().item() == pytest.approx(features.max().item() - 2, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(SHORTEST, 6000), min_size=1, max_size=5),
    filling=st.sampled_from([0.0, 1.0, -1e6, float("inf"), float("nan")]),
    spare=st.integers(0, 500),
)
def test_batch_equals_one_by_one_whatever_fills_it_up(lengths, filling, spare):
    waves = [voice(n, seed) for seed, n in enumerate(lengths)]
    padded = torch.full((len(waves), max(lengths) + spare), filling)
    for row, wave in zip(padded, waves):
        row[: len(wave)] = wave
    features = log_mel(padded, lengths)
    assert features.shape == (len(lengths), padded.shape[1] // 160, 80)
    frames = [frame_count(n) for n in lengths]
    for row, count, wave in zip(features, frames, waves):
        assert relative_error(row[:count], original(wave)) <= 1e-5
        assert torch.equal(row[count:], torch.zeros_like(row[count:]))


def test_autocast_does_not_lower_the_precision():
    wave = voice(16000)
    with torch.autocast("cpu", torch.bfloat16):
        features = alone(wave)
    assert relative_error(features, original(wave)) <= 1e-5


def test_other_numbers_of_bins_are_refused():
    with pytest.raises(ValueError, match=r"80 and 128 bins, not 64"):
        log_mel(torch.zeros(1, 1000), [1000], 64)
