"""Sequences laid end to end, with no padding between them.

Blocks of a transformer compute on such rows as they are. What needs the sequences apart (a convolution, a loss) spreads
the rows over more places, and takes them back.

Shapes: T rows of all sequences, P places, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

STEP = 64
"""Rows, or places, in which a pack grows: libraries prepare a kernel for each shape and keep it, so a few shapes that
come again cost less than the least rows (a quarter of the time of a small model on a CPU)."""


class _Spread(torch.autograd.Function):
    """Every place gets one row at most, so the gradient is a plain copy: the same from run to run, unlike a sum."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, index_T: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(index_T)
        return x_TC.new_zeros(count, *x_TC.shape[1:]).index_copy_(0, index_T, x_TC)

    @staticmethod
    def backward(ctx: Any, slope_PC: Tensor) -> tuple[Tensor, None, None]:
        return slope_PC.index_select(0, *ctx.saved_tensors), None, None


class _Take(torch.autograd.Function):
    """The other way round."""

    @staticmethod
    def forward(ctx: Any, x_PC: Tensor, index_T: Tensor) -> Tensor:
        ctx.save_for_backward(index_T)
        ctx.count = len(x_PC)
        return x_PC.index_select(0, index_T)

    @staticmethod
    def backward(ctx: Any, slope_TC: Tensor) -> tuple[Tensor, None]:
        (index_T,) = ctx.saved_tensors
        return slope_TC.new_zeros(ctx.count, *slope_TC.shape[1:]).index_copy_(0, index_T, slope_TC), None


@dataclass(frozen=True)
class Places:
    """Where the rows of packed sequences stand among more places, which are zero otherwise."""

    index_T: Tensor
    """int64: the place of each row; no two are the same."""
    count: int

    def spread(self, x_TC: Tensor) -> Tensor:
        """Return ``[P, C]``."""
        placed: Tensor = _Spread.apply(x_TC, self.index_T, self.count)  # type: ignore[no-untyped-call]
        return placed

    def take(self, x_PC: Tensor) -> Tensor:
        """Return ``[T, C]``; what stands elsewhere is left out, and gets no gradient."""
        taken: Tensor = _Take.apply(x_PC, self.index_T)  # type: ignore[no-untyped-call]
        return taken


def fill_up(x_TC: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Append rows of zeros, as a sequence of their own, up to a multiple of :data:`STEP`."""
    missing = -len(x_TC) % STEP
    return (F.pad(x_TC, (0, 0, 0, missing)), (*lengths, missing)) if missing else (x_TC, lengths)


def positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return the place of each row within its own sequence, int64 ``[T]``."""
    return torch.from_numpy(_within(np.asarray(lengths))).to(device, non_blocking=True)


def padded(lengths: Sequence[int], longest: int, device: torch.device) -> Places:
    """Return the places in a batch of sequences padded to ``longest``, seen as one row of places."""
    return _places(np.arange(len(lengths)) * longest, np.asarray(lengths), len(lengths) * longest, device)


def spaced(lengths: Sequence[int], strides: Sequence[int], gap: int, device: torch.device) -> list[Places]:
    """Return the places before and after each of several convolutions that no sequence may reach another through.

    Sequences begin where all strides do, and at least ``gap`` places behind the last one, before every convolution.

    Args:
        lengths: of the sequences.
        strides: of the convolutions; each makes ``(length - 1) // stride + 1`` of a length.
        gap: how far a kernel sees beyond the end, or the beginning, of a sequence.
        device: of the places.
    """
    levels = [np.asarray(lengths)]
    for stride in strides:
        levels.append((levels[-1] - 1) // stride + 1)
    rates = [math.prod(strides[:level]) for level in range(len(strides) + 1)]
    needed = np.max([(length + gap) * rate for length, rate in zip(levels[:-1], rates)], axis=0)
    blocks = -(-needed // rates[-1])
    starts = np.cumsum(blocks) - blocks
    step = max(1, STEP // rates[-1])
    count = -(-int(blocks.sum()) // step) * step
    return [
        _places(starts * (rates[-1] // rate), length, count * (rates[-1] // rate), device)
        for length, rate in zip(levels, rates)
    ]


def similar(lengths: Sequence[int], least: float) -> list[list[int]]:
    """Group the numbers of sequences, in falling length; none is shorter than ``least`` of its group's longest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[i] >= least * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def rows(lengths: Sequence[int], chosen: Sequence[int], device: torch.device) -> Places:
    """Return where the rows of some of the packed sequences stand in the pack, one chosen sequence behind the other."""
    each = np.asarray(lengths, np.int64)
    starts = np.cumsum(each) - each
    return _places(starts[list(chosen)], each[list(chosen)], int(each.sum()), device)


def _places(starts: NDArray[np.int64], lengths: NDArray[np.int64], count: int, device: torch.device) -> Places:
    index = np.repeat(starts, lengths) + _within(lengths)
    return Places(torch.from_numpy(index).to(device, non_blocking=True), count)


def _within(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    starts = np.cumsum(lengths) - lengths
    within: NDArray[np.int64] = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    return within
