"""Rotary positions by ``npu_rotary_mul``."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from osum_npu import functional

from .dtypes import ALL

_WIDEST_HEAD = 895
_MOST = 999
"""Sequences, and heads."""
_MOST_WITH_GRADIENT = 1024
"""Sequences times heads where cosines and sines have a gradient."""


def _accepts(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> bool:
    """An even width below 896, below 1000 sequences and heads, B · H up to 1024 where the angles have a gradient."""
    B, _, H, D = x_BTHD.shape
    learned = torch.is_grad_enabled() and (cos_BTD.requires_grad or sin_BTD.requires_grad)
    return D % 2 == 0 and D <= _WIDEST_HEAD and max(B, H) <= _MOST and (not learned or B * H <= _MOST_WITH_GRADIENT)


@functional.rotary.impl("npu", dtypes=ALL, accepts=_accepts)
def rotary(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """One kernel, in the pairing of LLaMA: channel i with i + D/2."""
    cos_BT1D, sin_BT1D = (angle.to(x_BTHD.dtype).unsqueeze(2) for angle in (cos_BTD, sin_BTD))
    return torch_npu.npu_rotary_mul(x_BTHD, cos_BT1D, sin_BT1D, rotary_mode="half")  # type: ignore[no-any-return]
