"""95 % confidence intervals of a share and of a ratio of sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
SEED = 20250117
_Z95 = 1.959963984540054
_BLOCK_ELEMENTS = 2**22
"""Draws held in memory at once: 32 MiB of int64."""


def wilson_interval(successes: int, trials: int) -> list[float] | None:
    """Return the Wilson score interval ``[low, high]`` of ``successes / trials``; ``None`` without trials."""
    if not trials:
        return None
    share, z2 = successes / trials, _Z95**2
    centre = share + z2 / (2 * trials)
    spread = _Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    return [max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)]


def bootstrap_interval(numerators: Sequence[float], denominators: Sequence[float]) -> list[float] | None:
    """Return the percentile bootstrap interval of ``sum(numerators) / sum(denominators)`` over utterances.

    Drawing utterances with replacement only asks how often each distinct (numerator, denominator) pair is drawn, so
    the draws are multinomial over the distinct pairs: few columns for edit counts, and no dependence on the order.

    Args:
        numerators: one number an utterance, such as its edit distance.
        denominators: one number an utterance, such as its reference length; not negative.

    Returns:
        ``[low, high]``, the same for the same pairs in any order; ``None`` where the denominators sum to 0.
    """
    if not sum(denominators):
        return None
    pairs, counts = np.unique(np.column_stack([numerators, denominators]).astype(float), axis=0, return_counts=True)
    n = int(counts.sum())
    rng = np.random.default_rng(SEED)
    block = max(1, _BLOCK_ELEMENTS // len(pairs))
    sums = np.concatenate(
        [
            rng.multinomial(n, counts / n, size=min(block, RESAMPLES - done)) @ pairs
            for done in range(0, RESAMPLES, block)
        ]
    )
    # A resample without a single reference token says nothing of the rate.
    numerator, denominator = sums[sums[:, 1] > 0].T
    low, high = np.percentile(numerator / denominator, [2.5, 97.5])
    return [float(low), float(high)]
