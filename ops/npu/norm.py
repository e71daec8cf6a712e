"""Root-mean-square norm by ``npu_rms_norm`` and ``npu_add_rms_norm``."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from osum_npu import functional

from .dtypes import ALL

MOST_AXES = 8


def _accepts(x: Tensor, weight: Tensor, eps: float) -> bool:  # noqa: ARG001  an op's accepts has its parameters
    """Two to eight axes."""
    return 2 <= x.ndim <= MOST_AXES


@functional.rms_norm.impl("npu", dtypes=ALL, accepts=_accepts)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One kernel; rounds once, after the weight."""
    # The kernel reads the weight as if it had the dtype of x.
    return torch_npu.npu_rms_norm(x, weight.to(x.dtype), epsilon=eps)[0]  # type: ignore[no-any-return]


def _accepts_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> bool:  # noqa: ARG001
    """Two to eight axes, both summands of one dtype."""
    return 2 <= x.ndim <= MOST_AXES and residual.dtype == x.dtype


@functional.add_rms_norm.impl("npu", dtypes=ALL, accepts=_accepts_add)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """One kernel without gradients, which torch_npu has not for it; with them a sum and the kernel of the norm."""
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, residual, weight)):
        total = residual + x
        return rms_norm(total, weight, eps), total
    normal, _, total = torch_npu.npu_add_rms_norm(x, residual, weight.to(x.dtype), epsilon=eps)
    return normal, total
