"""95 % confidence intervals of a share, of a ratio of sums, and of the difference between two such ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

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
    sums = _resampled_sums(np.column_stack([numerators, denominators]))
    # A resample without a single reference token says nothing of the rate.
    numerator, denominator = sums[sums[:, 1] > 0].T
    low, high = np.percentile(numerator / denominator, [2.5, 97.5])
    return [float(low), float(high)]


def bootstrap_difference(
    one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]
) -> tuple[float, list[float]] | None:
    """Return how much higher a ratio of sums is in ``other`` than in ``one``, with its percentile bootstrap interval.

    The two are of the same utterances, which are drawn together: what makes an utterance hard for both cancels out.

    Args:
        one: numerator and denominator of each utterance.
        other: the same of the same utterances, in the same order.

    Returns:
        (difference, ``[low, high]``); ``None`` where denominators sum to 0.

    Raises:
        ValueError: the two are not of equally many utterances.
    """
    if len(one) != len(other):
        raise ValueError(f"wanted numbers of the same utterances, got {len(one)} and {len(other)}")
    rows = np.hstack([np.asarray(side, dtype=float).reshape(-1, 2) for side in (one, other)])
    total = rows.sum(axis=0)
    if not (total[1] and total[3]):
        return None
    sums = _resampled_sums(rows)
    sums = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)]
    low, high = np.percentile(sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return float(total[2] / total[3] - total[0] / total[1]), [float(low), float(high)]


def _resampled_sums(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Draw as many rows as there are, :data:`RESAMPLES` times, and return the sums of their columns."""
    distinct, counts = np.unique(rows.astype(float), axis=0, return_counts=True)
    n = int(counts.sum())
    rng = np.random.default_rng(SEED)
    block = max(1, _BLOCK_ELEMENTS // len(distinct))
    sums: npt.NDArray[np.float64] = np.concatenate(
        [
            rng.multinomial(n, counts / n, size=min(block, RESAMPLES - done)) @ distinct
            for done in range(0, RESAMPLES, block)
        ]
    )
    return sums
