"""CPU: torch's flash attention, and bfloat16 without a detour through float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from osum_npu import functional

from . import sdpa

BOTH = (torch.float32, torch.bfloat16)

SHORT = 512
"""Keys up to which two bfloat16 products beat torch's flash kernel (see benchmarks/attention.py)."""


@functional.attention.impl("cpu", dtypes=BOTH, tolerance=sdpa.TOLERANCE)
def attention(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    *,
    causal: bool = False,
    mask_BTS: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Flash attention; for short bfloat16 sequences two matrix products, which oneDNN does several times faster."""
    short = key_BSKD.shape[1] <= SHORT
    if query_BTHD.dtype is not torch.bfloat16 or not short or query_BTHD.shape[2] != key_BSKD.shape[2]:
        return sdpa.attention(query_BTHD, key_BSKD, value_BSKD, causal=causal, mask_BTS=mask_BTS, scale=scale)
    T, S, D = query_BTHD.shape[1], key_BSKD.shape[1], query_BTHD.shape[3]
    query, key, value = (x.transpose(1, 2) for x in (query_BTHD, key_BSKD, value_BSKD))
    score_BHTS = torch.matmul(query * (D**-0.5 if scale is None else scale), key.transpose(2, 3))
    hidden = None if mask_BTS is None else ~mask_BTS[:, None]
    if causal:
        upper = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        hidden = upper if hidden is None else hidden | upper
    if hidden is None:
        return torch.matmul(score_BHTS.softmax(-1), value).transpose(1, 2)
    weight_BHTS = score_BHTS.masked_fill(hidden, torch.finfo(score_BHTS.dtype).min).softmax(-1)
    # a query that may attend to nothing gives zero, not the mean
    dead = hidden.all(-1, keepdim=True)
    return torch.matmul(weight_BHTS, value).masked_fill(dead, 0.0).transpose(1, 2)


@functional.packed_attention.impl("cpu", dtypes=BOTH, tolerance=sdpa.TOLERANCE)
def packed_attention(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    *,
    lengths: tuple[int, ...],
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """No masks; one call for neighbours of one length."""
    return sdpa.by_length(attention, query_THD, key_TKD, value_TKD, lengths, causal=causal, scale=scale)


@functional.swiglu.impl("cpu", dtypes=(torch.bfloat16,), tolerance={torch.bfloat16: (6e-2, 6e-2)})
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Rounds once more than the reference, and moves half the bytes."""
    return F.silu(gate) * up
