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
    size = -(-len(wave) // 2048) * 2048  # a length with a large prime factor takes several times as long
    spectrum = np.fft.rfft(wave, size)
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    return _wave(np.fft.irfft(spectrum * ((frequency >= low) & (frequency <= high)), size)[: len(wave)])


def warp_time(wave: Wave, displacement: Wave) -> Wave:
    """Read every sample from ``displacement`` seconds later: vibrato and glides."""
    n = len(wave)
    return _wave(np.interp(np.arange(n) + displacement * SAMPLE_RATE, np.arange(n), wave))


def tremble(wave: Wave, depth: float, hertz: float) -> Wave:
    """Modulate pitch and loudness together."""
    phase = 2 * np.pi * hertz * _seconds(len(wave))
    bent = warp_time(wave, (0.012 * depth / hertz * np.sin(phase)).astype(np.float32))
    return _wave(bent * (1 - depth * 0.5 * (1 + np.sin(phase))))


def hoarsen(wave: Wave, depth: float, rng: Generator) -> Wave:
    """Roughen a voice with noise that is at each moment up to ``depth`` times as loud as it."""
    return _wave(wave * (1 + depth * rng.uniform(-1, 1, len(wave))))


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
    for i in range(int(rng.integers(3, 5))):
        n = int(0.09 * SAMPLE_RATE)
        tone = _voiced(np.full(n, base * 0.94**i)) + 0.5 * _noise(0.09, rng)[:n]
        beats += [_decay(tone, 0.01, 0.05), _silence(rng.uniform(0.06, 0.09))]
    return np.concatenate(beats)


def _cough(rng: Generator) -> Wave:
    burst = [_decay(_noise(0.2, rng, 200, rng.uniform(2000, 3000)), 0.004, 0.035) for _ in range(2)]
    return np.concatenate([part for b in burst for part in (b, _silence(rng.uniform(0.05, 0.12)))])


def _cry(rng: Generator) -> Wave:
    n = int(rng.uniform(0.5, 0.7) * SAMPLE_RATE)
    t = _seconds(n)
    pitch = rng.uniform(380, 480) * (1 - 0.25 * t / t[-1]) * (1 + 0.05 * np.sin(2 * np.pi * 6 * t))
    return _wave(_voiced(pitch, 8) * (0.4 + 0.6 * np.abs(np.sin(np.pi * 4 * t))))


def _screaming(rng: Generator) -> Wave:
    n = int(rng.uniform(0.4, 0.6) * SAMPLE_RATE)
    t = _seconds(n)
    pitch = rng.uniform(900, 1200) * (1 + 0.1 * np.minimum(1, t / 0.15))
    return _wave(np.tanh(3 * (_voiced(pitch, 6) + 0.4 * _noise(n / SAMPLE_RATE + 0.01, rng)[:n])))


def _sigh(rng: Generator) -> Wave:
    wave = _noise(rng.uniform(0.5, 0.7), rng, 150, rng.uniform(900, 1300))
    t = np.linspace(0, 1, len(wave))
    return _wave(wave * np.sin(np.pi * t**0.6))


def _throat_clearing(rng: Generator) -> Wave:
    n = int(rng.uniform(0.4, 0.5) * SAMPLE_RATE)
    t = _seconds(n)
    rough = 0.5 * (1 + np.sign(np.sin(2 * np.pi * rng.uniform(22, 30) * t)))
    return (
        _voiced(np.full(n, rng.uniform(85, 110)), 20) * rough + 0.3 * _noise(n / SAMPLE_RATE + 0.01, rng)[:n]
    ).astype(np.float32)


def _sneeze(rng: Generator) -> Wave:
    inhale = _noise(rng.uniform(0.2, 0.3), rng, 800, 4000)
    inhale *= np.linspace(0, 0.4, len(inhale), dtype=np.float32)
    return np.concatenate([inhale, _silence(0.05), _decay(_noise(0.3, rng, 2500, 7800) * 2, 0.005, 0.1)])


def _other(rng: Generator) -> Wave:
    tones = [
        _decay(np.sin(2 * np.pi * f * _seconds(int(0.2 * SAMPLE_RATE))), 0.003, 0.1) for f in rng.uniform(1500, 3000, 2)
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
    """Make one vocal event of 0.3 to 0.8 s, peak 0.6."""
    wave = EVENTS[label](rng)
    return _wave(wave * (0.6 / np.abs(wave).max()))


@dataclass(frozen=True)
class Delivery:
    """How a sentence is spoken."""

    pace: float = 1.0
    """Factor on the speaking rate."""
    pitch: int = 0
    """Added to espeak-ng's pitch."""
    pitch_range: int = 50
    """espeak-ng's pitch range, 0 is monotone."""
    colour: Callable[[Wave], Wave] = lambda wave: wave
    """Applied to the sound of the speech; keeps its length."""
    interjection: Callable[[], Wave] = lambda: np.zeros(0, np.float32)
    """Uttered before the speech."""


def _saturate(wave: Wave) -> Wave:
    return _wave(np.tanh(4 * wave))


def _dull(wave: Wave) -> Wave:
    return _wave(0.3 * wave + 0.7 * band(wave, 0, 2200))


def _shiver(wave: Wave) -> Wave:
    return _wave(wave * (0.7 + 0.3 * np.sin(2 * np.pi * 12 * _seconds(len(wave)))))


def _creak(wave: Wave) -> Wave:
    return _wave(wave * (0.5 + 0.5 * (np.sin(2 * np.pi * 40 * _seconds(len(wave))) > 0)))


def _bright(wave: Wave) -> Wave:
    return _wave(wave + 2 * band(wave, 3000, 8000))


def _contour(low: float, high: float, seconds: float, brightness: int) -> Wave:
    """A tone that glides between two pitches, fading in and out."""
    n = int(seconds * SAMPLE_RATE)
    return _wave(_voiced(np.linspace(low, high, n), brightness) * np.hanning(n))


def _giggle() -> Wave:
    return np.concatenate([_contour(400, 500, 0.09, 6), _contour(450, 560, 0.09, 6)])


def _sob() -> Wave:
    return _contour(420, 240, 0.2, 3)


def _growl() -> Wave:
    return _wave(np.tanh(3 * _contour(75, 95, 0.2, 25)))


def _oh() -> Wave:
    return _contour(220, 620, 0.18, 10)


def _gasp() -> Wave:
    n = int(0.2 * SAMPLE_RATE)
    return _wave(_noise(0.2, np.random.default_rng(0), 1500, 6000)[:n] * np.linspace(0, 1, n) ** 2)


def _ugh() -> Wave:
    n = int(0.2 * SAMPLE_RATE)
    return _wave(_noise(0.2, np.random.default_rng(0), 100, 900)[:n] * (np.sin(2 * np.pi * 40 * _seconds(n)) > 0))


def _hum() -> Wave:
    return _contour(250, 250, 0.2, 1)


EMOTIONS: dict[str, Delivery] = {
    "neutral": Delivery(),
    "happy": Delivery(pace=1.05, pitch=15, pitch_range=95, colour=_bright, interjection=_giggle),
    "sad": Delivery(pace=0.85, pitch=-15, pitch_range=15, colour=_dull, interjection=_sob),
    "anger": Delivery(pace=1.1, pitch_range=80, colour=_saturate, interjection=_growl),
    "surprise": Delivery(pitch=10, pitch_range=90, interjection=_oh),
    "fear": Delivery(pace=1.1, pitch=10, colour=_shiver, interjection=_gasp),
    "disgust": Delivery(pace=0.9, pitch=-10, colour=_creak, interjection=_ugh),
    "other": Delivery(pitch_range=0, interjection=_hum),
}


def _ticks(n: int, rng: Generator) -> Wave:
    t = _seconds(n)
    return _wave(np.sin(2 * np.pi * rng.uniform(950, 1050) * t) * (np.mod(t, 0.2) < 0.03))


def _drone(n: int, rng: Generator) -> Wave:
    t, base = _seconds(n), rng.uniform(60, 80)
    return _wave(np.sum([np.sin(2 * np.pi * base * ratio * t) for ratio in (1, 1.06, 3.03)], axis=0))


def _music_box(n: int, rng: Generator) -> Wave:
    step = int(0.15 * SAMPLE_RATE)
    scale = 2093 * 2 ** (np.array([0, 4, 7, 12]) / 12)
    notes = [_decay(np.sin(2 * np.pi * f * _seconds(step)), 0.002, 0.05) for f in rng.choice(scale, -(-n // step))]
    return np.concatenate(notes)[:n]


def _dial_tone(n: int, rng: Generator) -> Wave:
    t = _seconds(n)
    return _wave((np.sin(2 * np.pi * 480 * t) + np.sin(2 * np.pi * 620 * t)) * (np.mod(t + rng.uniform(), 0.5) < 0.25))


def _surf(n: int, rng: Generator) -> Wave:
    swell = 1 + 0.5 * np.sin(2 * np.pi * (0.5 * _seconds(n) + rng.uniform()))
    return _wave(_noise((n + 1) / SAMPLE_RATE, rng, 5500, 7900)[:n] * swell)


def _chord(n: int, rng: Generator) -> Wave:
    t, base = _seconds(n), rng.uniform(255, 270)
    return _wave(np.sum([np.sin(2 * np.pi * base * ratio * t) for ratio in (1, 1.26, 1.5)], axis=0))


def _street(n: int, rng: Generator) -> Wave:
    return _noise((n + 1) / SAMPLE_RATE, rng, 200, 2500)[:n]


def _chirps(n: int, rng: Generator) -> Wave:
    t = np.mod(_seconds(n) + rng.uniform(), 0.25)
    return _wave(np.sin(2 * np.pi * (3200 * t + 4000 * t**2)))


@dataclass(frozen=True)
class Bed:
    """What sounds under the speech in a style."""

    sound: Callable[[int, Generator], Wave]
    """Makes so many samples."""
    level: float
    """Root mean square, relative to the speech's."""


STYLES: dict[str, Bed] = {
    "新闻科普": Bed(_ticks, 0.2),
    "恐怖故事": Bed(_drone, 0.3),
    "童话故事": Bed(_music_box, 0.15),
    "客服": Bed(_dial_tone, 0.15),
    "诗歌散文": Bed(_surf, 0.12),
    "有声书": Bed(_chord, 0.15),
    "日常口语": Bed(_street, 0.12),
    "其他": Bed(_chirps, 0.12),
}


def lay_under(wave: Wave, bed: Bed, rng: Generator) -> Wave:
    """Lay a bed under speech."""
    sound = bed.sound(len(wave), rng)
    return _wave(wave + sound * (bed.level * _rms(wave) / _rms(sound)))


def _rms(wave: Wave) -> float:
    return float(np.sqrt(np.mean(wave**2))) + 1e-6
