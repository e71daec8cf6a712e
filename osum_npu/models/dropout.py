"""Dropout that costs little on a CPU, where torch's own draws a number for each element, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEVELS = 2**16
"""A number of 16 bits decides about an element, so the rate is met to 1 in 65536."""


class Dropout(nn.Dropout):
    """As ``torch.nn.Dropout``: in training an element is zero with probability ``p``, else grows by ``1 / (1 - p)``.

    On a CPU four elements share a number of 64 bits; on other devices it is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape and dtype."""
        limit = round(self.p * _LEVELS)
        if not (self.training and limit and x.is_cpu):
            return super().forward(x)
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = drawn.view(torch.int16)[: x.numel()].view(x.shape) >= limit - _LEVELS // 2
        return x * kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - limit))
