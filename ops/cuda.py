"""CUDA: torch's fused attention and norm, and half precision without a detour through float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from osum_npu import functional

from . import sdpa

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32)


@functional.attention.impl("cuda", dtypes=ALL, tolerance=sdpa.TOLERANCE)
def attention(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    *,
    causal: bool = False,
    mask_BTS: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Repeats the keys where no fused kernel takes groups; flash attention does: half precision without a mask."""
    T, H = query_BTHD.shape[1:3]
    S, K = key_BSKD.shape[1:3]
    if H != K and (query_BTHD.dtype not in HALF or sdpa.needs_mask(T, S, causal, mask_BTS)):
        key_BSKD, value_BSKD = (x.repeat_interleave(H // K, dim=2) for x in (key_BSKD, value_BSKD))
    return sdpa.attention(query_BTHD, key_BSKD, value_BSKD, causal=causal, mask_BTS=mask_BTS, scale=scale)


functional.packed_attention.impl("cuda", dtypes=ALL, tolerance=sdpa.TOLERANCE)(sdpa.packed_attention)


def _same_dtype(x: Tensor, weight: Tensor, eps: float) -> bool:  # noqa: ARG001  an op's accepts has its parameters
    """A weight in the dtype of x."""
    return weight.dtype == x.dtype


@functional.rms_norm.impl("cuda", dtypes=ALL, accepts=_same_dtype)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One kernel; rounds once, after the weight."""
    return F.rms_norm(x, weight.shape, weight, eps)


def _same_dtypes(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> bool:  # noqa: ARG001
    """Summands and weight of one dtype."""
    return residual.dtype == weight.dtype == x.dtype


@functional.add_rms_norm.impl("cuda", dtypes=ALL, accepts=_same_dtypes)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A sum and one kernel."""
    total = residual + x
    return F.rms_norm(total, weight.shape, weight, eps), total


@functional.swiglu.impl("cuda", dtypes=HALF, tolerance={torch.bfloat16: (6e-2, 6e-2), torch.float16: (1e-2, 1e-2)})
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Rounds once more than the reference, and moves half the bytes."""
    return F.silu(gate) * up
