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


@functional.rms_norm.impl("npu", dtypes=ALL, accepts=_accepts, tolerance={torch.bfloat16: (3e-2, 6e-2)})
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One kernel; rounds once, after the weight."""
    # The kernel reads the weight as if it had the dtype of x.
    return torch_npu.npu_rms_norm(x, weight.to(x.dtype), epsilon=eps)[0]  # type: ignore[no-any-return]


def _accepts_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> bool:  # noqa: ARG001
    """Two to eight axes, both summands of one dtype."""
    return 2 <= x.ndim <= MOST_AXES and residual.dtype == x.dtype


@functional.add_rms_norm.impl("npu", dtypes=ALL, accepts=_accepts_add)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """One kernel; reads and writes the sum once."""
    normal, _, total = torch_npu.npu_add_rms_norm(x, residual, weight.to(x.dtype), epsilon=eps)
    return normal, total
