"""The speakers of the synthesized corpus: variants of espeak-ng, made younger or older by simple means.

A child is the same voice with a shorter vocal tract (played faster, so all formants rise) and a higher pitch; an old
speaker has a longer one, speaks slowly, trembles and is hoarse. That is a stand-in for real speakers, not a model of
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from osum_npu.data.synthesis.grammar import Split

Age = Literal["child", "adult", "old"]

_MALE = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "Alex", "Andy", "Gene", "Lee", "Mike", "Denis"),
    *("Michael", "paul", "edward", "antonio", "norbert", "Storm", "robert", "miguel"),
)
_FEMALE = ("f1", "f2", "f3", "f4", "f5", "Annie", "Andrea", "Alicia", "belinda", "steph", "steph2", "anika")
_TEST = frozenset({"m3", "m7", "Alex", "Denis", "paul", "f2", "Andrea", "steph2"})
"""Variants that only the test split speaks with, at every age: 24 % of all voices."""
_DEV = frozenset({"m5", "Michael", "f4"})


@dataclass(frozen=True)
class Voice:
    """One speaker."""

    variant: str
    """espeak-ng's voice variant."""
    gender: Literal["female", "male"]
    age: Age

    @property
    def name(self) -> str:
        """Speaker name in manifests."""
        return f"{self.variant}-{self.age}"

    @property
    def split(self) -> Split:
        """The split whose utterances this voice speaks."""
        return "test" if self.variant in _TEST else "dev" if self.variant in _DEV else "train"

    @property
    def tract(self) -> float:
        """Factor on all frequencies, from the length of the vocal tract."""
        child = 1.3 if self.gender == "male" else 1.25
        return {"child": child, "adult": 1.0, "old": 0.92}[self.age]

    @property
    def pitch(self) -> int:
        """espeak-ng's pitch."""
        return {"child": 75, "adult": 50, "old": 40}[self.age]

    @property
    def pace(self) -> float:
        """Factor on the speaking rate."""
        return 0.9 if self.age == "old" else 1.0

    @property
    def tremor(self) -> float:
        """Depth of the trembling of pitch and loudness, 0 to 1."""
        return 0.45 if self.age == "old" else 0.0

    @property
    def hoarseness(self) -> float:
        """Loudest noise of the voice, relative to it."""
        return 0.6 if self.age == "old" else 0.0


_AGES: tuple[Age, ...] = ("child", "adult", "old")

VOICES: tuple[Voice, ...] = (
    *(Voice(variant, "male", age) for variant in _MALE for age in _AGES),
    *(Voice(variant, "female", age) for variant in _FEMALE for age in _AGES),
)
