"""SpecAugment and time substitution on log-mel features.

What is masked is drawn on the host from a generator of the sample's own, so that augmentation does not depend on the
batch, the worker or the rank; it is applied to the whole batch on the device.
Source: wenet, wenet/dataset/processor.py (``spec_aug``, ``spec_sub``), as OSUM uses them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as typed
from torch import Tensor

from osum_npu.strict import STRICT


@typed(frozen=True, config=STRICT)
class SpecAugmentConfig:
    """How much of the features is hidden; the defaults are OSUM's."""

    time_masks: int = Field(default=2, ge=0, description="masks along time")
    time_frames: int = Field(default=50, ge=1, description="longest of them, in frames of 10 ms")
    frequency_masks: int = Field(default=2, ge=0, description="masks along frequency")
    frequency_bins: int = Field(default=10, ge=1, description="widest of them, in mel bins")
    substitutions: int = Field(default=3, ge=0, description="stretches replaced by an earlier stretch")
    substitution_frames: int = Field(default=30, ge=1, description="longest of them, in frames")


@dataclass(frozen=True)
class Drawn:
    """What happens to one utterance."""

    hidden_frames: NDArray[np.bool_]
    hidden_bins: NDArray[np.bool_]
    source_frames: NDArray[np.int64]


def draw(config: SpecAugmentConfig, frames: int, n_mels: int, rng: random.Random) -> Drawn:
    """Draw masks and substitutions for an utterance of ``frames`` frames; two or three draws each, as wenet does."""
    hidden_frames, hidden_bins = np.zeros(frames, np.bool_), np.zeros(n_mels, np.bool_)
    source = np.arange(frames)
    for _ in range(config.time_masks):
        start, length = rng.randint(0, frames - 1), rng.randint(1, config.time_frames)
        hidden_frames[start : start + length] = True
    for _ in range(config.frequency_masks):
        start, length = rng.randint(0, n_mels - 1), rng.randint(1, config.frequency_bins)
        hidden_bins[start : start + length] = True
    for _ in range(config.substitutions):
        start, length = rng.randint(0, frames - 1), rng.randint(1, config.substitution_frames)
        end, back = min(start + length, frames), rng.randint(0, start)
        source[start:end] = np.arange(start - back, end - back)
    return Drawn(hidden_frames, hidden_bins, source)


def apply(features_BTM: Tensor, drawn: Sequence[Drawn]) -> Tensor:
    """Apply one :class:`Drawn` to each utterance of a padded batch; hidden places become 0."""
    batch, frames, bins = features_BTM.shape
    hidden_BT = np.zeros((batch, frames), np.bool_)
    source_BT = np.tile(np.arange(frames), (batch, 1))
    for i, one in enumerate(drawn):
        hidden_BT[i, : len(one.hidden_frames)] = one.hidden_frames
        source_BT[i, : len(one.source_frames)] = one.source_frames
    hidden_BM = np.stack([one.hidden_bins for one in drawn])
    # A frame that is put elsewhere is hidden there as it was in its own place. Factors cost a third of masked_fill.
    kept_BT = np.take_along_axis(~hidden_BT, source_BT, axis=1).astype(np.float32)
    rows = source_BT + frames * np.arange(batch)[:, None]
    device = features_BTM.device
    moved_BTM = features_BTM.reshape(-1, bins).index_select(0, torch.from_numpy(rows.reshape(-1)).to(device))
    moved_BTM = moved_BTM.view(batch, frames, bins)
    moved_BTM *= torch.from_numpy(kept_BT).to(device)[..., None]
    moved_BTM *= torch.from_numpy((~hidden_BM).astype(np.float32)).to(device)[:, None]
    return moved_BTM
