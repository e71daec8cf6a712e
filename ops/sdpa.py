"""Attention by ``torch.nn.functional.scaled_dot_product_attention``, for every device that has kernels behind it.

Shapes as in ``osum_npu.functional``.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = {torch.bfloat16: (3e-2, 2e-1), torch.float16: (5e-3, 3e-2)}
"""The kernels round probabilities and their gradients to half precision in the backward pass; it shows where a query
has few keys."""


def needs_mask(T: int, S: int, causal: bool, mask_BTS: Tensor | None) -> bool:
    """Say whether attention takes an explicit mask, which keeps it from the fastest kernels."""
    # The causal flag of torch counts from the first key, ours from the last; a single query sees every key.
    return mask_BTS is not None or (causal and T not in (1, S))


def attention(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    *,
    causal: bool = False,
    mask_BTS: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute ``osum_npu.functional.attention``."""
    T, S = query_BTHD.shape[1], key_BSKD.shape[1]
    query, key, value = (x.transpose(1, 2) for x in (query_BTHD, key_BSKD, value_BSKD))
    grouped = query_BTHD.shape[2] != key_BSKD.shape[2]
    if not needs_mask(T, S, causal, mask_BTS):
        out_BHTD = F.scaled_dot_product_attention(
            query, key, value, is_causal=causal and T > 1, scale=scale, enable_gqa=grouped
        )
        return out_BHTD.transpose(1, 2)
    allowed = None if mask_BTS is None else mask_BTS[:, None]
    if causal:
        lower = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
        allowed = lower if allowed is None else allowed & lower
    assert allowed is not None
    # Kernels differ on a query that may attend to nothing: let it see all, and put zero in the place of its result.
    alive = allowed.any(-1, keepdim=True)
    out_BHTD = F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed | ~alive, scale=scale, enable_gqa=grouped
    )
    return out_BHTD.masked_fill(~alive, 0.0).transpose(1, 2)


def packed_attention(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    *,
    lengths: tuple[int, ...],
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute ``osum_npu.functional.packed_attention``: no masks, one call for neighbours of one length."""
    runs = [(length, len(list(run))) for length, run in groupby(lengths) if length]
    sizes = [length * count for length, count in runs]
    parts = zip(*(torch.split(x, sizes) for x in (query_THD, key_TKD, value_TKD)), runs, strict=True)
    outs = [
        attention(*(x.unflatten(0, (count, length)) for x in part), causal=causal, scale=scale).flatten(0, 1)
        for *part, (length, count) in parts
    ]
    return torch.cat(outs) if len(outs) > 1 else outs[0]
