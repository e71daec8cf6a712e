"""Speech from text by espeak-ng, with the true time of every word.

The library comes as a wheel (``espeakng-loader``, GPL, the extra ``quickstart``) and is loaded by ctypes,
so nothing of it is imported by the rest of the system. The names follow espeak-ng's ``speak_lib.h``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

_SYNCHRONOUS = 2
_POSITION_CHARACTER = 1
_CHARS_UTF8 = 1
_PHONEME_EVENTS = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_EVENT_WORD, _EVENT_END, _EVENT_PHONEME = 1, 5, 7


class _Event(ctypes.Structure):
    """``espeak_EVENT``."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Speech:
    """What espeak-ng said."""

    audio: NDArray[np.float32]
    """Samples in [-1, 1] at :attr:`rate`."""
    rate: int
    starts: tuple[tuple[int, float], ...]
    """(first character of a word in the text, its start in seconds)."""
    phonemes: tuple[tuple[str, float], ...]
    """(phoneme, its start in seconds); an empty name is a pause."""


class _Engine:
    """The one espeak-ng of this process; its state is global, so use it from one thread."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise ValueError(
                "speech synthesis needs the package espeakng-loader: pip install 'osum-npu[quickstart]'"
            ) from error
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path()
        self.rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), _PHONEME_EVENTS)
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng did not start with its data in {data}")
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else its noise follows the clock
        self.chunks: list[NDArray[np.int16]] = []
        self.events: list[tuple[int, int, float, str]] = []
        self.callback = _Callback(self._receive)
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, wav: Any, n_samples: int, events: Any) -> int:
        if wav and n_samples:
            self.chunks.append(np.ctypeslib.as_array(wav, (n_samples,)).copy())
        i = 0
        while events[i].type != 0:
            event = events[i]
            name = event.id.decode("utf-8", "ignore") if event.type == _EVENT_PHONEME else ""
            self.events.append((event.type, event.text_position, event.sample / self.rate, name))
            i += 1
        return 0


@cache
def _engine() -> _Engine:
    return _Engine()


def speak(text: str, voice: str, *, rate: int = 175, pitch: int = 50, pitch_range: int = 50) -> Speech:
    """Say ``text``.

    Args:
        text: plain text.
        voice: language and variant, ``en-us+f2`` or ``cmn+m3``.
        rate: words a minute, 80 to 450.
        pitch: 0 to 99, 50 is the voice's own.
        pitch_range: 0 (monotone) to 99.

    Raises:
        ValueError: espeakng-loader is not installed, or there is no such voice.
    """
    engine = _engine()
    if engine.library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice!r}")
    for parameter, value in ((_RATE, rate), (_VOLUME, 100), (_PITCH, pitch), (_RANGE, pitch_range)):
        engine.library.espeak_SetParameter(parameter, value, 0)
    engine.chunks.clear()
    engine.events.clear()
    raw = text.encode()
    engine.library.espeak_Synth(raw, len(raw) + 1, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
    audio = np.concatenate(engine.chunks) if engine.chunks else np.zeros(0, np.int16)
    return Speech(
        audio=audio.astype(np.float32) / 32768.0,
        rate=engine.rate,
        starts=tuple((p - 1, t) for kind, p, t, _ in engine.events if kind == _EVENT_WORD),
        phonemes=tuple((name, t) for kind, _, t, name in engine.events if kind == _EVENT_PHONEME),
    )
