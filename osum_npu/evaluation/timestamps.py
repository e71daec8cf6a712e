"""How far the word times of an answer lie from the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from osum_npu.evaluation.error_rate import align
from osum_npu.evaluation.text import tokens
from osum_npu.tasks import Word


@dataclass(frozen=True)
class TimeShift:
    """Word times of one or more utterances against their reference."""

    total_ms: float = 0.0
    """Sum over matched words of ``(|Δstart| + |Δend|) / 2``, in milliseconds."""
    matched: int = 0
    """Reference words that the hypothesis has too."""
    reference: int = 0
    """Reference words."""

    def __add__(self, other: TimeShift) -> TimeShift:
        return TimeShift(self.total_ms + other.total_ms, self.matched + other.matched, self.reference + other.reference)

    @property
    def average_ms(self) -> float | None:
        """Accumulated averaging shift (AAS) in milliseconds; ``None`` where no word matched."""
        return self.total_ms / self.matched if self.matched else None

    @property
    def matched_share(self) -> float | None:
        """Share of the reference words that the average speaks for; ``None`` without reference words."""
        return self.matched / self.reference if self.reference else None


def time_shift(reference: Sequence[Word], hypothesis: Sequence[Word], lang: str | None = None) -> TimeShift:
    """Compare the times of the words that reference and hypothesis share.

    Words are aligned by edit distance on their normalised text; only aligned words that agree have times to compare
    (AAS: Shi et al. 2023, "Achieving timestamp prediction while recognizing with non-autoregressive end-to-end ASR
    model"). Words of punctuation alone are left out.

    Args:
        reference: words with their true times in seconds.
        hypothesis: words with the times that were answered; empty where nothing came back.
        lang: language code, as for :func:`osum_npu.evaluation.text.tokens`.
    """
    expected = [(key, word) for word in reference if (key := _key(word.text, lang))]
    answered = [(key, word) for word in hypothesis if (key := _key(word.text, lang))]
    seconds, matched = 0.0, 0
    for span in align([key for key, _ in expected], [key for key, _ in answered]):
        if span.equal:
            for (_, true), (_, said) in zip(expected[span.reference], answered[span.hypothesis], strict=True):
                seconds += (abs(true.start - said.start) + abs(true.end - said.end)) / 2
                matched += 1
    return TimeShift(1000 * seconds, matched, len(expected))


@lru_cache(maxsize=65536)
def _key(word: str, lang: str | None) -> str:
    return " ".join(tokens(word, lang))
