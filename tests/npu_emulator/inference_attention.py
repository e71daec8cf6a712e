"""What attention for inference means: npu_fused_infer_attention_score, its two versions, on dense layouts.

Shapes: B batch, N query heads, K key heads, S queries, D head width. A call with S = 1 takes the incremental kernel of
the device, another one the prompt kernel; the rules differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npu_emulator.attention import (
    Band,
    from_bnsd,
    hidden,
    require_band,
    require_keys,
    softmax_attention,
    split_heads,
)
from npu_emulator.rules import Refused, require, require_dtypes, require_none, shape

LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND")
HALVES = (torch.float16, torch.bfloat16)
WIDEST, MOST_HEADS, MOST_GROUPS, MOST_CHANNELS = 512, 256, 64, 65535


def _counts(operator: str, name: str, given: Sequence[int] | None, B: int, S: int) -> list[int]:
    """Read lengths: None for all of S, one for the whole batch, or at least one an entry."""
    counts = [S] if given is None else [int(n) for n in given]
    got = f"{operator} got {name}={counts} for a batch of {B} with {S} tokens each"
    require(len(counts) == 1 or len(counts) >= B, "lengths-are-counts", got)
    counts = counts * B if len(counts) == 1 else counts[:B]
    require(all(0 <= n <= S for n in counts), "lengths-are-counts", got)
    return counts


def _mask_by_entry(operator: str, mask: Tensor, B: int, S: int, keys: int) -> Tensor:
    """Read a mask of mode 0 or 1 as ``[B, S, keys]``."""
    got = f"{operator} got atten_mask {shape(mask)} for B={B}, {S} queries, {keys} keys"
    takes = {(1, S, keys), (B, 1, S, keys), (1, 1, S, keys), (B, keys) if S == 1 else (S, keys)}
    require(tuple(mask.shape) in takes, "mask-shape", got)
    if mask.dim() == 2:
        mask = mask[:, None] if S == 1 else mask[None]
    return (mask[:, 0] if mask.dim() == 4 else mask).bool().expand(B, S, keys)


def _attend(operator: str, query: Tensor, key: Tensor, value: Tensor, names: dict[str, str], options: dict[str, Any]):
    """Attend as both versions do; ``names`` translates version 1's names of options to those given."""
    own = {name: options.pop(given) for name, given in names.items()}
    layout, mode = options.pop("input_layout"), options.pop("sparse_mode")
    before, after, precise = (options.pop(name) for name in ("pre_tokens", "next_tokens", "inner_precise"))
    mask, pse = options.pop("atten_mask"), options.pop("pse_shift")
    key_heads = options.pop("num_key_value_heads")
    # What is left quantises, pages, or adds rope inputs: all are off by None or 0.
    require_none(operator, {name: value or None for name, value in options.items() if not isinstance(value, Tensor)})
    require_none(operator, {name: value for name, value in options.items() if isinstance(value, Tensor)})

    tensors = {"query": query, "key": key, "value": value}
    got = ", ".join(f"{name} {shape(x)}" for name, x in tensors.items())
    if layout == "TND":
        raise Refused("no-reference", f"{operator} got TND, which takes head widths of 192 and 128 alone")
    require(layout in LAYOUTS, "layout-is-known", f"{operator} got {layout}")
    read = layout.split("_")[0]
    require(all(x.dim() == len(read) for x in tensors.values()), "dimensions-fit", f"{operator} in {layout}: {got}")
    require_dtypes(operator, HALVES, {**tensors, "pse_shift": pse})
    strided = [name for name, x in tensors.items() if not x.is_contiguous()]
    require(not strided, "inputs-are-contiguous", f"{operator} got strided {', '.join(strided)}")
    if mask is not None:
        require(mask.dtype in (torch.bool, torch.int8, torch.uint8), "mask-is-bool", f"{operator} got {mask.dtype}")
    require(mode in range(5), "mode-is-known", f"{operator} got sparse_mode={mode}")

    heads = own["num_heads"]
    Q, K, V = split_heads(operator, read, heads, query, key, value)
    (B, N, S, D), keys = Q.shape, K.shape[2]
    words = f"{operator} got {heads} heads, {key_heads} key heads with {got} in {layout}"
    require((N, K.shape[1]) == (heads, key_heads or heads), "head-count-is-the-shape's", words)
    require(N % K.shape[1] == 0 and N // K.shape[1] <= MOST_GROUPS, "heads-are-a-multiple", words)
    require(N <= MOST_HEADS, "head-count-is-the-shape's", words)
    require(K.shape == V.shape and K.shape[0] == B, "keys-fit-values", words)
    require(D == K.shape[3] <= WIDEST and (S == 1 or D % 16 == 0), "head-width-fits", words)
    require(S == 1 or read == "BNSD" or N * D < MOST_CHANNELS, "head-width-fits", words)
    require(own["scale"] != 1.0 or D == 1, "scale-is-passed", f"{operator} got 1.0 with D={D}")
    require(S > 1 or layout in ("BSH", "BSND", "BNSD"), "layout-is-known", f"{operator} got {layout} with one query")
    require(S > 1 or mode == 0, "one-query-has-no-mode", f"{operator} got sparse_mode={mode}")
    require(
        precise in (range(4) if S > 1 else (0, 1)), "no-reference", f"{operator} got inner_precise={precise}, S={S}"
    )
    band = Band(mask, mode, before, after, precise)
    if S > 1:  # the incremental kernel ignores pre and next tokens
        require_band(operator, band)
    by_entry = _mask_by_entry(operator, mask, B, S, keys) if mask is not None and mode in (0, 1) else None

    q_counts = _counts(operator, names["actual_seq_lengths"], None if S == 1 else own["actual_seq_lengths"], B, S)
    k_counts = _counts(operator, names["actual_seq_lengths_kv"], own["actual_seq_lengths_kv"], B, keys)
    out, lse = Q.new_zeros(B, N, S, D), torch.full((B, N, S, 1), float("inf"))
    for b, (n, m) in enumerate(zip(q_counts, k_counts, strict=True)):
        if not n or not m:
            continue  # no query, or nothing to see: zeros
        mine = band if by_entry is None else band._replace(mask=by_entry[b, :n, :m])
        hide = mine.mask if S == 1 else hidden(operator, n, m, mine)
        require_keys(operator, hide, mine, (2, 3))
        bias = None
        if pse is not None:
            fits = pse.dim() == 4 and pse.shape[0] in (1, B) and tuple(pse.shape[1:]) == (N, S, keys)
            require(fits, "dimensions-fit", f"{operator} got pse_shift {shape(pse)}")
            shift = pse[min(b, len(pse) - 1), :, :n, :m].float()
            bias = lambda score, shift=shift: score * own["scale"] + shift  # noqa: E731
        mine_q, mine_k, mine_v = (x[b : b + 1, :, :count] for x, count in ((Q, n), (K, m), (V, m)))
        one, highest, total = softmax_attention(mine_q, mine_k, mine_v, hide, own["scale"], bias)
        out[b, :, :n], lse[b, :, :n] = one[0], (total.log() + highest)[0]
    out = from_bnsd(out, "BSND" if layout == "BNSD_BSND" else layout)
    return out.contiguous(), lse if own["softmax_lse_flag"] else torch.zeros(1)


SAME = {
    name: name for name in ("num_heads", "scale", "actual_seq_lengths", "actual_seq_lengths_kv", "softmax_lse_flag")
}


def npu_fused_infer_attention_score(query, key, value, **options):
    """Version 1. Returns attention in the layout of the query, and log-sum-exp ``[B, N, S, 1]`` or a zero ``[1]``."""
    return _attend("npu_fused_infer_attention_score", query, key, value, SAME, options)


def npu_fused_infer_attention_score_v2(query, key, value, **options):
    """Version 2: the same under other names."""
    names = {
        "num_heads": "num_query_heads",
        "scale": "softmax_scale",
        "actual_seq_lengths": "actual_seq_qlen",
        "actual_seq_lengths_kv": "actual_seq_kvlen",
        "softmax_lse_flag": "return_softmax_lse",
    }
    return _attend("npu_fused_infer_attention_score_v2", query, key, value, names, options)
