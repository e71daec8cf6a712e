"""Edit counts between token lists, and the word or character error rate of a whole set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

try:
    from rapidfuzz.distance import Levenshtein
except ImportError as error:
    raise ImportError("scoring needs rapidfuzz; install it with: pip install 'osum-npu[eval]'") from error


@dataclass(frozen=True)
class EditCounts:
    """How a hypothesis differs from its reference, in tokens. Counts of several utterances add up."""

    correct: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __add__(self, other: EditCounts) -> EditCounts:
        return EditCounts(
            self.correct + other.correct,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    @property
    def reference(self) -> int:
        """Tokens of the reference."""
        return self.correct + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        """The edit distance."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float | None:
        """Errors a reference token, 0.05 for 5 %; ``None`` where there is no reference token to divide by."""
        return self.errors / self.reference if self.reference else None


@dataclass(frozen=True)
class Span:
    """Equal or differing stretches of reference and hypothesis: ``reference[start:end]`` against ``hypothesis[…]``."""

    equal: bool
    reference: slice
    hypothesis: slice


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Span]:
    """Align two token lists with the fewest substitutions, deletions and insertions (each costs one).

    Returns:
        Spans that cover both lists from first to last token.
    """
    return [
        Span(block.tag == "equal", slice(block.src_start, block.src_end), slice(block.dest_start, block.dest_end))
        for block in Levenshtein.opcodes(reference, hypothesis)
    ]


def edit_counts(reference: Sequence[str], hypothesis: Sequence[str] | None) -> EditCounts:
    """Count the edits that turn ``reference`` into ``hypothesis``.

    Args:
        reference: tokens that were said.
        hypothesis: tokens that were recognised; ``None`` (nothing came back) deletes every reference token.
    """
    counts = dict.fromkeys(("replace", "delete", "insert"), 0)
    for operation in Levenshtein.editops(reference, hypothesis or ()):
        counts[operation.tag] += 1
    correct = len(reference) - counts["replace"] - counts["delete"]
    return EditCounts(correct, counts["replace"], counts["delete"], counts["insert"])
