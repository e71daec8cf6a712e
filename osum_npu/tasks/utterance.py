"""What is known about one recording, or one text: where the sound lies and which labels it carries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from osum_npu.audio.tar_member import TarMember
from osum_npu.tasks.text import HAN

TEXT_SECONDS = 1.0
"""What a row without sound counts for in a batch, …"""
TEXT_BYTES_PER_SECOND = 40.0
"""… and how many bytes of its text make a second more: about as many positions of an LLM as a second of sound does, at
3 to 4 bytes a token."""

_HAN = re.compile(f"[{HAN}]")


class Word(NamedTuple):
    """One word (English) or character (Han) with its time span in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One row of a manifest, resolved and checked. ``None`` means not labelled at the source."""

    key: str
    wav: str | TarMember | None
    """Path of the sound file, or where it lies in a tar; ``None`` of a row that is text alone."""
    duration: float | None = None
    """Seconds from ``start`` to ``end``."""
    start: float = 0.0
    """First second of the file that belongs to this utterance."""
    end: float | None = None
    """Last second; ``None`` means the end of the file."""
    text: str | None = None
    """Transcript as :func:`osum_npu.tasks.normalize_text` writes it."""
    lang: str | None = None
    speaker: str | None = None
    words: tuple[Word, ...] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label by task name: ``{"gender": "male", "emotion": "happy"}``."""
    reply: str | None = None
    """What a chat partner would answer."""
    prompt: str | None = None
    """An instruction of the row's own, instead of one of the task's paraphrases."""
    thought: str | None = None
    """What a chat partner would think before the reply."""
    intent: str | None = None
    """Name of the task that ``prompt`` asks for: the row is an example of that task alone."""

    @property
    def seconds(self) -> float:
        """What the row counts for in a batch: the length of its sound, 0 where it is not known; or of its text."""
        if self.wav is not None:
            return self.duration or 0.0
        texts = (self.prompt, self.text, self.thought, self.reply, self.intent)
        return TEXT_SECONDS + sum(len(text.encode()) for text in texts if text) / TEXT_BYTES_PER_SECOND

    @property
    def language(self) -> str:
        """Language code; guessed by the script of the text, or of the reply, where ``lang`` does not say."""
        return self.lang or ("zh" if _HAN.search(self.text or self.reply or "") else "en")
