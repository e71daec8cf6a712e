"""Vocal events, emotions and styles by simple sound synthesis: a stand-in that can be learned, not an imitation.

Everything works on float32 waveforms of 16 kHz and is deterministic from the generator passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from osum_npu.audio.read import SAMPLE_RATE

Wave = NDArray[np.float32]
Generator = np.random.Generator


def _wave(samples: NDArray[Any]) -> Wave:
    return np.asarray(samples, np.float32)


def band(wave: Wave, low: float, high: float) -> Wave:
    """Keep the frequencies between ``low`` and ``high`` Hz."""
    spectrum = np.fft.rfft(wave)
    frequency = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    return _wave(np.fft.irfft(spectrum * ((frequency >= low) & (frequency <= high)), len(wave)))


def warp_time(wave: Wave, displacement: Wave) -> Wave:
    """Read every sample from ``displacement`` seconds later: vibrato and glides."""
    n = len(wave)
    return _wave(np.interp(np.arange(n) + displacement * SAMPLE_RATE, np.arange(n), wave))


def tremble(wave: Wave, depth: float, hertz: float) -> Wave:
    """Modulate pitch and loudness together."""
    phase = 2 * np.pi * hertz * _seconds(len(wave))
    bent = warp_time(wave, (0.012 * depth / hertz * np.sin(phase)).astype(np.float32))
    return _wave(bent * (1 - depth * 0.5 * (1 + np.sin(phase))))


def _seconds(n: int) -> NDArray[np.float64]:
    return np.arange(n) / SAMPLE_RATE


def _noise(seconds: float, rng: Generator, low: float = 100, high: float = 7000) -> Wave:
    return band(rng.standard_normal(int(seconds * SAMPLE_RATE)).astype(np.float32), low, high)


def _decay(wave: Wave, attack: float, half_life: float) -> Wave:
    t = _seconds(len(wave))
    return _wave(wave * np.minimum(1, t / attack) * 0.5 ** (t / half_life))


def _voiced(pitch: NDArray[np.float64], brightness: int = 12) -> Wave:
    """Sum harmonics of a pitch contour in Hz."""
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    return sum(np.sin(k * phase) / k for k in range(1, brightness + 1)).astype(np.float32)  # type: ignore[union-attr]


def _silence(seconds: float) -> Wave:
    return np.zeros(int(seconds * SAMPLE_RATE), np.float32)


def _laugh(rng: Generator) -> Wave:
    base = rng.uniform(180, 320)
    beats = []
    for i in range(int(rng.integers(4, 7))):
        n = int(0.09 * SAMPLE_RATE)
        tone = _voiced(np.full(n, base * 0.94**i)) + 0.5 * _noise(0.09, rng)[:n]
        beats += [_decay(tone, 0.01, 0.05), _silence(rng.uniform(0.06, 0.09))]
    return np.concatenate(beats)


def _cough(rng: Generator) -> Wave:
    burst = [
        _decay(_noise(0.22, rng, 200, rng.uniform(2000, 3000)), 0.004, 0.035) for _ in range(int(rng.integers(2, 4)))
    ]
    return np.concatenate([part for b in burst for part in (b, _silence(rng.uniform(0.05, 0.12)))])


def _cry(rng: Generator) -> Wave:
    n = int(rng.uniform(0.8, 1.1) * SAMPLE_RATE)
    t = _seconds(n)
    pitch = rng.uniform(380, 480) * (1 - 0.25 * t / t[-1]) * (1 + 0.05 * np.sin(2 * np.pi * 6 * t))
    return _wave(_voiced(pitch, 8) * (0.4 + 0.6 * np.abs(np.sin(np.pi * 2.2 * t))))


def _screaming(rng: Generator) -> Wave:
    n = int(rng.uniform(0.7, 1.0) * SAMPLE_RATE)
    t = _seconds(n)
    pitch = rng.uniform(900, 1200) * (1 + 0.1 * np.minimum(1, t / 0.15))
    return _wave(np.tanh(3 * (_voiced(pitch, 6) + 0.4 * _noise(n / SAMPLE_RATE + 0.01, rng)[:n])))


def _sigh(rng: Generator) -> Wave:
    wave = _noise(rng.uniform(0.8, 1.1), rng, 150, rng.uniform(900, 1300))
    t = np.linspace(0, 1, len(wave))
    return _wave(wave * np.sin(np.pi * t**0.6))


def _throat_clearing(rng: Generator) -> Wave:
    n = int(rng.uniform(0.5, 0.7) * SAMPLE_RATE)
    t = _seconds(n)
    rough = 0.5 * (1 + np.sign(np.sin(2 * np.pi * rng.uniform(22, 30) * t)))
    return (
        _voiced(np.full(n, rng.uniform(85, 110)), 20) * rough + 0.3 * _noise(n / SAMPLE_RATE + 0.01, rng)[:n]
    ).astype(np.float32)


def _sneeze(rng: Generator) -> Wave:
    inhale = _noise(rng.uniform(0.25, 0.35), rng, 800, 4000)
    inhale *= np.linspace(0, 0.4, len(inhale), dtype=np.float32)
    return np.concatenate([inhale, _silence(0.05), _decay(_noise(0.4, rng, 2500, 7800) * 2, 0.005, 0.1)])


def _other(rng: Generator) -> Wave:
    tones = [
        _decay(np.sin(2 * np.pi * f * _seconds(int(0.3 * SAMPLE_RATE))).astype(np.float32), 0.003, 0.15)
        for f in rng.uniform(1500, 3000, 2)
    ]
    return np.concatenate(tones)


EVENTS: dict[str, Callable[[Generator], Wave]] = {
    "laugh": _laugh,
    "cough": _cough,
    "cry": _cry,
    "screaming": _screaming,
    "sigh": _sigh,
    "throat clearing": _throat_clearing,
    "sneeze": _sneeze,
    "other": _other,
}


def event(label: str, rng: Generator) -> Wave:
    """Make one vocal event of 0.4 to 1.2 s, peak 0.6."""
    wave = EVENTS[label](rng)
    return _wave(wave * (0.6 / np.abs(wave).max()))


@dataclass(frozen=True)
class Delivery:
    """How a sentence is spoken and what is done to the sound afterwards."""

    pace: float = 1.0
    """Factor on the speaking rate."""
    pitch: int = 0
    """Added to espeak-ng's pitch."""
    pitch_range: int = 50
    """espeak-ng's pitch range, 0 is monotone."""
    colour: Callable[[Wave, Generator], Wave] = lambda wave, _: wave
    """Applied to the finished speech; keeps its length."""


def _saturate(wave: Wave, _: Generator) -> Wave:
    return _wave(np.tanh(8 * wave))


def _dull(wave: Wave, _: Generator) -> Wave:
    return band(wave, 0, 2600)


def _glide_up(wave: Wave, _: Generator) -> Wave:
    t = _seconds(len(wave))
    return warp_time(wave, (0.02 * np.sin(2 * np.pi * 2.5 * t)).astype(np.float32))


def _shiver(wave: Wave, _: Generator) -> Wave:
    return _wave(wave * (0.65 + 0.35 * np.sin(2 * np.pi * 11 * _seconds(len(wave)))))


def _creak(wave: Wave, _: Generator) -> Wave:
    return _wave(wave * (0.3 + 0.7 * (np.sin(2 * np.pi * 45 * _seconds(len(wave))) > 0)))


def _bright(wave: Wave, _: Generator) -> Wave:
    return _wave(wave + 3 * band(wave, 3000, 8000))


def _hollow(wave: Wave, _: Generator) -> Wave:
    delay = int(0.004 * SAMPLE_RATE)
    return _wave(wave - np.concatenate([np.zeros(delay, np.float32), wave[:-delay]]))


EMOTIONS: dict[str, Delivery] = {
    "neutral": Delivery(),
    "happy": Delivery(pace=1.1, pitch=15, pitch_range=95, colour=_bright),
    "sad": Delivery(pace=0.8, pitch=-15, pitch_range=15, colour=_dull),
    "anger": Delivery(pace=1.15, pitch_range=80, colour=_saturate),
    "surprise": Delivery(pitch=10, pitch_range=90, colour=_glide_up),
    "fear": Delivery(pace=1.15, pitch=10, colour=_shiver),
    "disgust": Delivery(pace=0.85, pitch=-10, colour=_creak),
    "other": Delivery(pitch_range=0, colour=_hollow),
}


def _bed(wave: Wave, bed: Wave, level: float) -> Wave:
    """Lay a sound under speech, ``level`` relative to the speech's root mean square."""
    rms = float(np.sqrt(np.mean(wave**2))) + 1e-6
    return _wave(wave + bed * (level * rms / (float(np.sqrt(np.mean(bed**2))) + 1e-6)))


def _bulletin(wave: Wave, rng: Generator) -> Wave:
    t = _seconds(len(wave))
    ticks = np.sin(2 * np.pi * rng.uniform(950, 1050) * t) * (np.mod(t, 0.25) < 0.03)
    return _bed(wave, ticks.astype(np.float32), 0.5)


def _drone(wave: Wave, rng: Generator) -> Wave:
    t = _seconds(len(wave))
    base = rng.uniform(60, 80)
    bed = np.sin(2 * np.pi * base * t) + np.sin(2 * np.pi * base * 1.06 * t) + np.sin(2 * np.pi * base * 3.03 * t)
    return _bed(wave, bed.astype(np.float32), 0.6)


def _music_box(wave: Wave, rng: Generator) -> Wave:
    step = int(0.18 * SAMPLE_RATE)
    scale = 1047 * 2 ** (np.array([0, 4, 7, 12, 16]) / 12)
    notes = [
        _decay(np.sin(2 * np.pi * f * _seconds(step)).astype(np.float32), 0.002, 0.05)
        for f in rng.choice(scale, len(wave) // step + 1)
    ]
    return _bed(wave, np.concatenate(notes)[: len(wave)], 0.45)


def _telephone(wave: Wave, _: Generator) -> Wave:
    return band(wave, 300, 3400)


def _room(wave: Wave, rng: Generator) -> Wave:
    tail = _decay(rng.standard_normal(int(0.35 * SAMPLE_RATE)).astype(np.float32), 0.001, 0.07)
    size = 2 ** int(np.ceil(np.log2(len(wave) + len(tail))))
    echo = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(tail, size), size)[: len(wave)].astype(np.float32)
    return _bed(wave, echo, 0.7)


def _street(wave: Wave, rng: Generator) -> Wave:
    return _bed(wave, _noise(len(wave) / SAMPLE_RATE + 0.01, rng, 200, 3500)[: len(wave)], 0.25)


def _hum(wave: Wave, rng: Generator) -> Wave:
    t = _seconds(len(wave))
    return _bed(wave, np.sign(np.sin(2 * np.pi * rng.uniform(195, 205) * t)).astype(np.float32), 0.25)


def _hush(wave: Wave, rng: Generator) -> Wave:
    return _bed(wave, _noise(len(wave) / SAMPLE_RATE + 0.01, rng, 5000, 7900)[: len(wave)], 0.3)


STYLES: dict[str, Delivery] = {
    "新闻科普": Delivery(pace=1.1, pitch_range=35, colour=_bulletin),
    "恐怖故事": Delivery(pace=0.85, pitch=-10, colour=_drone),
    "童话故事": Delivery(pitch=12, pitch_range=90, colour=_music_box),
    "客服": Delivery(colour=_telephone),
    "诗歌散文": Delivery(pace=0.8, pitch_range=70, colour=_hush),
    "有声书": Delivery(pace=0.95, colour=_room),
    "日常口语": Delivery(pace=1.15, colour=_street),
    "其他": Delivery(colour=_hum),
}
