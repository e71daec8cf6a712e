"""Attention by ``npu_fusion_attention``, and for decoding by ``npu_fused_infer_attention_score``.

Three rules that the operators do not enforce: True in a mask means *masked out*; a causal mode without the compressed
mask is silently not causal; the scale is 1 unless it is passed. Source: torch_npu 2.13, operator documentation.

Shapes as in ``osum_npu.functional``.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate

import torch
import torch_npu
from torch import Tensor

from osum_npu import functional

from .dtypes import ALL, HALF

CAUSAL = 3
"""Sparse mode: query i sees key j where ``j <= i + S - T``; takes the compressed mask, whatever T and S are."""
_COMPRESSED = 2048
"""Side of the compressed mask."""
_MOST_HEADS = 256
_WIDEST_HEAD = 512
"""torch_npu's page says 768, MindSpeed's 512."""
_MOST_SEQUENCES = 1024
_MOST_GROUPS = 64
"""Query heads that share a key head, for decoding."""

TOLERANCE = {torch.bfloat16: (3e-2, 2e-1), torch.float16: (5e-3, 3e-2)}
"""The kernel keeps probabilities and their gradients in half precision."""


@cache
def compressed_mask(device: torch.device) -> Tensor:
    """Return the mask of the causal modes, True above the diagonal: one a device, 4 MiB."""
    return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu(1)


def _heads_fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    H, D = query.shape[-2:]
    K = key.shape[-2]
    return H <= _MOST_HEADS and H % K == 0 and D == key.shape[-1] >= value.shape[-1] and D <= _WIDEST_HEAD


def _accepts(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    *,
    causal: bool = False,  # noqa: ARG001  an op's accepts has its parameters
    mask_BTS: Tensor | None = None,
    scale: float | None = None,  # noqa: ARG001
) -> bool:
    """At most 256 heads, in groups of one size, of a width up to 512; queries, keys and values of one dtype."""
    same = query_BTHD.dtype == key_BSKD.dtype == value_BSKD.dtype
    return same and _heads_fit(query_BTHD, key_BSKD, value_BSKD) and (mask_BTS is None or mask_BTS.dtype == torch.bool)


@functional.attention.impl("npu", dtypes=ALL, accepts=_accepts, tolerance=TOLERANCE)
def attention(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    *,
    causal: bool = False,
    mask_BTS: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One fused kernel; groups of query heads read their key head without a copy."""
    T, H, D = query_BTHD.shape[1:]
    S = key_BSKD.shape[1]
    factor = D**-0.5 if scale is None else scale
    if mask_BTS is None:
        if _decodes(query_BTHD, key_BSKD, value_BSKD):
            return _decode(query_BTHD, key_BSKD, value_BSKD, None, factor)
        settings = {"atten_mask": compressed_mask(query_BTHD.device), "sparse_mode": CAUSAL} if causal else {}
        return torch_npu.npu_fusion_attention(  # type: ignore[no-any-return]
            query_BTHD, key_BSKD, value_BSKD, H, "BSND", scale=factor, **settings
        )[0]
    allowed_BTS = mask_BTS.expand(-1, T, -1)
    if causal:
        allowed_BTS = allowed_BTS & torch.ones(T, S, dtype=torch.bool, device=mask_BTS.device).tril(S - T)
    # A query that may attend to nothing: let it see all, and put zero in the place of its result.
    alive_BT1 = allowed_BTS.any(-1, keepdim=True)
    hidden_B1TS = ~(allowed_BTS | ~alive_BT1)[:, None]
    if _decodes(query_BTHD, key_BSKD, value_BSKD):
        out_BTHD = _decode(query_BTHD, key_BSKD, value_BSKD, hidden_B1TS, factor)
    else:
        out_BTHD = torch_npu.npu_fusion_attention(
            query_BTHD, key_BSKD, value_BSKD, H, "BSND", atten_mask=hidden_B1TS, scale=factor
        )[0]
    return out_BTHD.masked_fill(~alive_BT1[..., None], 0.0)


def _decodes(query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor) -> bool:
    """Whether this is one new token on a cache, without gradients, as the operator for inference takes it."""
    inputs = (query_BTHD, key_BSKD, value_BSKD)
    T, H, D = query_BTHD.shape[1:]
    return (
        T == 1
        and query_BTHD.dtype in HALF
        and D % 16 == 0
        and H // key_BSKD.shape[2] <= _MOST_GROUPS
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
        and all(x.transpose(1, 2).is_contiguous() for x in inputs)  # as a cache of transformers lies in memory
    )


def _decode(
    query_B1HD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, hidden_B11S: Tensor | None, scale: float
) -> Tensor:
    query_BH1D, key_BKSD, value_BKSD = (x.transpose(1, 2) for x in (query_B1HD, key_BSKD, value_BSKD))
    out_BH1D: Tensor = torch_npu.npu_fused_infer_attention_score(
        query_BH1D,
        key_BKSD,
        value_BKSD,
        num_heads=query_BH1D.shape[1],
        num_key_value_heads=key_BKSD.shape[1],
        input_layout="BNSD",
        atten_mask=hidden_B11S,
        scale=scale,
    )[0]
    return out_BH1D.transpose(1, 2)


def _accepts_packed(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    *,
    lengths: tuple[int, ...],
    causal: bool = False,  # noqa: ARG001
    scale: float | None = None,  # noqa: ARG001
) -> bool:
    """At most 1024 sequences and 256 heads, in groups of one size, of a width up to 512; one dtype."""
    same = query_THD.dtype == key_TKD.dtype == value_TKD.dtype
    return same and _heads_fit(query_THD, key_TKD, value_TKD) and len(lengths) <= _MOST_SEQUENCES


@functional.packed_attention.impl("npu", dtypes=ALL, accepts=_accepts_packed, tolerance=TOLERANCE)
def packed_attention(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    *,
    lengths: tuple[int, ...],
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """One kernel for all sequences, without padding."""
    # Ends of the sequences, without a leading 0, which would be taken for an empty first sequence.
    ends = list(accumulate(length for length in lengths if length))
    settings = {"atten_mask": compressed_mask(query_THD.device), "sparse_mode": CAUSAL} if causal else {}
    return torch_npu.npu_fusion_attention(  # type: ignore[no-any-return]
        query_THD,
        key_TKD,
        value_TKD,
        query_THD.shape[1],
        "TND",
        scale=query_THD.shape[2] ** -0.5 if scale is None else scale,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        **settings,
    )[0]
