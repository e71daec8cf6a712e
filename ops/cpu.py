"""CPU: torch's flash attention, and bfloat16 without a detour through float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from osum_npu import functional, packing

from . import sdpa

BOTH = (torch.float32, torch.bfloat16)

FULL = 0.5
"""Sequences of at least this share of the longest are one batch."""
LENGTHS = 8
"""Lengths of such batches are multiples of it, so that their shapes come again."""
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
    allowed = None if mask_BTS is None else mask_BTS[:, None]
    out_BTHD = _products(query_BTHD, key_BSKD, value_BSKD, allowed, causal, scale)
    T, S = query_BTHD.shape[1], key_BSKD.shape[1]
    if allowed is None and (not causal or T <= S):
        return out_BTHD
    # a query that may attend to nothing gives zero, not the mean
    alive = torch.ones(1, 1, 1, S, dtype=torch.bool) if allowed is None else allowed
    alive_B1T = (alive & torch.ones(T, S, dtype=torch.bool).tril(S - T) if causal else alive).any(-1)
    return out_BTHD.masked_fill(~alive_B1T.transpose(1, 2)[..., None], 0.0)


def _products(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    allowed_B1TS: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Attend by two products; a query that may attend to nothing gets the mean."""
    T, S, D = query_BTHD.shape[1], key_BSKD.shape[1], query_BTHD.shape[3]
    query, key, value = (x.transpose(1, 2) for x in (query_BTHD, key_BSKD, value_BSKD))
    score_BHTS = torch.matmul(query * (D**-0.5 if scale is None else scale), key.transpose(2, 3))
    lowest = torch.finfo(score_BHTS.dtype).min / 2
    if allowed_B1TS is not None:
        score_BHTS = score_BHTS + torch.zeros(allowed_B1TS.shape, dtype=score_BHTS.dtype).masked_fill(
            ~allowed_B1TS, lowest
        )
    if causal:
        score_BHTS = score_BHTS + torch.full((T, S), lowest, dtype=score_BHTS.dtype).triu(S - T + 1)
    return torch.matmul(score_BHTS.softmax(-1), value).transpose(1, 2)


@dataclass(frozen=True)
class _Group:
    """Sequences of similar lengths, which are computed as one padded batch."""

    rows_T: Tensor | None
    """int64: where their rows stand in the pack; ``None`` where they are the whole of it, in order."""
    places: packing.Places
    """Where the rows stand in the padded batch."""
    shape: tuple[int, int]
    """Sequences, and the length of the longest."""
    inside_BT: Tensor | None
    """bool: False at padding; ``None`` where there is none."""


@lru_cache(maxsize=8)
def _groups(lengths: tuple[int, ...]) -> list[_Group]:
    """Put sequences of similar lengths together; the layers of a model ask for the same again."""
    starts = np.cumsum(lengths) - lengths
    falling = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    parts: list[list[int]] = []
    for i in falling:
        longest = lengths[parts[-1][0]] if parts else 0
        similar = lengths[i] >= FULL * longest if longest <= SHORT else lengths[i] == longest
        if parts and similar:
            parts[-1].append(i)
        else:
            parts.append([i])
    groups = []
    for part in parts:
        counts = [lengths[i] for i in part]
        longest = counts[0] + -counts[0] % LENGTHS
        whole = part == list(range(len(lengths)))
        rows = None if whole else torch.from_numpy(np.concatenate([starts[i] + np.arange(lengths[i]) for i in part]))
        inside = torch.arange(longest) < torch.tensor(counts)[:, None]
        places = packing.padded(counts, longest, torch.device("cpu"))
        groups.append(_Group(rows, places, (len(part), longest), None if inside.all() else inside))
    return groups


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
    """One call a sequence; in bfloat16, where calls cost more than a little padding, similar lengths are one batch."""
    if query_THD.dtype is not torch.bfloat16:
        return sdpa.packed_attention(query_THD, key_TKD, value_TKD, lengths=lengths, causal=causal, scale=scale)
    outs, groups = [], _groups(lengths)
    for group in groups:
        batch = [_unpacked(x, group) for x in (query_THD, key_TKD, value_TKD)]
        out_BTHD = _padded_attention(*batch, inside_BT=group.inside_BT, causal=causal, scale=scale)
        outs.append(out_BTHD.flatten(0, 1) if group.inside_BT is None else group.places.take(out_BTHD.flatten(0, 1)))
    if groups and groups[0].rows_T is None:
        return outs[0]
    rows_T = torch.cat([group.rows_T for group in groups if group.rows_T is not None])
    return packing.Places(rows_T, len(query_THD)).spread(torch.cat(outs))


def _unpacked(x_THD: Tensor, group: _Group) -> Tensor:
    if group.rows_T is not None:
        x_THD = packing.Places(group.rows_T, len(x_THD)).take(x_THD)
    if group.inside_BT is not None:
        x_THD = group.places.spread(x_THD)
    return x_THD.view(*group.shape, *x_THD.shape[1:])


def _padded_attention(
    query_BTHD: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    *,
    inside_BT: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Attend within sequences padded on the right; what padding attends to does not matter."""
    if causal:  # no row sees what is padded behind it
        inside_BT = None
    if query_BTHD.shape[1] <= SHORT and query_BTHD.shape[2] == key_BTKD.shape[2]:
        allowed_B11T = None if inside_BT is None else inside_BT[:, None, None]
        return _products(query_BTHD, key_BTKD, value_BTKD, allowed_B11T, causal, scale)
    mask_B1T = None if inside_BT is None else inside_BT[:, None]
    return sdpa.attention(query_BTHD, key_BTKD, value_BTKD, causal=causal, mask_BTS=mask_B1T, scale=scale)


@functional.swiglu.impl("cpu", dtypes=(torch.bfloat16,), tolerance={torch.bfloat16: (6e-2, 6e-2)})
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Rounds once more than the reference, and moves half the bytes."""
    return F.silu(gate) * up
