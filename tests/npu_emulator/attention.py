"""What attention for training means: npu_fusion_attention, its three versions and their gradients.

Shapes: B batch, N query heads, K key heads (N is a multiple of K), S queries or keys, D head width, H = N·D, T all
tokens of packed sequences. Everything is computed in float32 as ``[B, N, S, D]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npu_emulator.rules import FLOATS, require, require_dtypes, require_none, shape

UNBOUNDED = 2**31 - 1
"""Default of the pre and next tokens."""
COMPRESSED = 2048
"""Side of the causal mask that sparse modes 2, 3 and 4 take."""
DIMENSIONS = {"BSH": 3, "SBH": 3, "BSND": 4, "BNSD": 4, "TND": 3}
WIDEST, MOST_HEADS, MOST_SEQUENCES = 768, 256, 1024

Ends = Sequence[int] | None


class Band(NamedTuple):
    """Which keys a query sees: mask (True = masked out), sparse mode, pre and next tokens, inner_precise."""

    mask: Tensor | None
    mode: int
    before: int
    after: int
    inner_precise: int


@cache
def upper_triangle() -> Tensor:
    """Return the compressed mask."""
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)


def require_triangle(operator: str, band: Band) -> None:
    """Modes 2, 3 and 4: the mask is there, has the compressed shape and content."""
    assert band.mask is not None
    got = f"{operator} got atten_mask {shape(band.mask)} with sparse_mode={band.mode}"
    extra, last = band.mask.shape[:-2], tuple(band.mask.shape[-2:])
    require(last == (COMPRESSED, COMPRESSED) and set(extra) <= {1}, "mask-is-compressed", got)
    content = band.mask.reshape(COMPRESSED, COMPRESSED).bool()
    inverted = torch.equal(content, ~upper_triangle())
    require(not inverted, "mask-true-is-masked-out", f"{got}: its complement")
    require(torch.equal(content, upper_triangle()), "mask-is-upper-triangle", got)


def require_band(operator: str, band: Band) -> None:
    """The mask has a dtype that can say True, and is there where the mode rests on it."""
    if band.mask is None:
        require(band.mode == 0, "mask-is-given", f"{operator} got sparse_mode={band.mode} and no atten_mask")
        bounds = (band.before, band.after)
        require(bounds == (UNBOUNDED,) * 2, "band-needs-mask", f"{operator} got pre and next tokens {bounds}")
        return
    if band.mode == 4:
        require(band.before + band.after >= 0, "band-is-not-empty", f"{operator} got {band.before}, {band.after}")
    if band.mode >= 2:
        require_triangle(operator, band)


def hidden(operator: str, S: int, keys: int, band: Band) -> Tensor | None:
    """Return the pairs that take no part, ``[…, S, keys]``; None where all do."""
    if band.mask is None:
        return None
    i, j = torch.arange(S)[:, None], torch.arange(keys)[None]
    if band.mode in (0, 1):
        got = f"{operator} got atten_mask {shape(band.mask)} for {S} queries and {keys} keys"
        require(tuple(band.mask.shape[-2:]) == (S, keys), "mask-shape", got)
        own = band.mask.bool()
        if band.mode == 0:
            outside = (j > i + band.after) | (j < i - band.before)
            words = f"{operator} got pre and next tokens {band.before}, {band.after}"
            require(bool((own | ~outside).all()), "band-fits-mask", words)
        if S == keys > 1:  # a query that may see anything sees itself, unless the mask says the inverse
            sees = ~own
            itself = sees.diagonal(dim1=-2, dim2=-1)
            require(bool(itself.any() or not sees.any()), "mask-true-is-masked-out", f"{got}: no query sees itself")
        return own
    if band.mode == 2:
        return j > i
    last = i + keys - S  # the key beside query i, counted from the bottom right corner
    if band.mode == 3:
        return j > last
    return (j > last + band.after) | (j < last - band.before)


def require_keys(operator: str, hide: Tensor | None, band: Band, precise: tuple[int, ...]) -> None:
    """With a mask of one's own every query sees a key, unless invalid rows are asked for."""
    if hide is None or band.mode > 1 or band.inner_precise in precise:
        return
    got = f"{operator} got inner_precise={band.inner_precise} and a mask with a row that is masked out throughout"
    require(not bool(hide.all(-1).any()), "row-sees-a-key", got)


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hide: Tensor | None,
    scale: float,
    bias: Callable[[Tensor], Tensor] | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend in float32.

    Args:
        query: ``[B, N, S, D]``.
        key: ``[B, K, keys, D]``.
        value: ``[B, K, keys, D of values]``.
        hide: True where a pair takes no part, broadcast to ``[B, N, S, keys]``.
        scale: factor of the scores.
        bias: changes the products of query and key, before the mask; it then applies the scale itself.
        keep: changes the probabilities (dropout).

    Returns:
        Attention ``[B, N, S, D of values]`` in the dtype of the query, and maximum and sum of each softmax row,
        ``[B, N, S, 1]`` in float32. A query that sees nothing gets 0.
    """
    groups = query.shape[1] // key.shape[1]
    wide_key, wide_value = (x.repeat_interleave(groups, 1).float() for x in (key, value))
    score = query.float() @ wide_key.transpose(-1, -2)
    score = score * scale if bias is None else bias(score)
    if hide is not None:
        score = score.masked_fill(hide, float("-inf"))
    highest = score.amax(-1, keepdim=True) if score.shape[-1] else score.new_full((*score.shape[:-1], 1), float("-inf"))
    highest = highest.masked_fill(highest.isinf(), 0.0).detach()  # the softmax does not depend on it
    weight = (score - highest).exp()
    total = weight.sum(-1, keepdim=True)
    weight = weight / total.clamp_min(torch.finfo(torch.float32).tiny)
    if keep is not None:
        weight = keep(weight)
    return (weight @ wide_value).to(query.dtype), highest, total.detach()


def to_bnsd(x: Tensor, layout: str, heads: int) -> Tensor:
    """Read a dense layout as ``[B, N, S, D]``."""
    if layout == "BNSD":
        return x
    if layout == "BSND":
        return x.transpose(1, 2)
    split = x.unflatten(2, (heads, -1))
    return split.transpose(1, 2) if layout == "BSH" else split.permute(1, 2, 0, 3)


def from_bnsd(x: Tensor, layout: str) -> Tensor:
    """Write ``[B, N, S, D]`` as a dense layout."""
    if layout == "BNSD":
        return x
    if layout == "BSND":
        return x.transpose(1, 2).contiguous()
    return x.transpose(1, 2).flatten(2) if layout == "BSH" else x.permute(2, 0, 1, 3).flatten(2)


def split_heads(operator: str, layout: str, heads: int, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Read query, key and value as ``[B, N, S, D]``; N of the query is ``heads``."""
    got = (
        f"{operator} got head_num={heads} with query {shape(query)}, key {shape(key)}, value {shape(value)} in {layout}"
    )
    require(heads > 0, "head-count-is-the-shape's", got)
    if len(layout) == 4:
        return [to_bnsd(x, layout, heads) for x in (query, key, value)]
    require(query.shape[2] % heads == 0, "head-count-is-the-shape's", got)
    width = query.shape[2] // heads  # BSH and SBH do not show the heads of the keys: they follow from the width
    key_heads = key.shape[2] // width
    require(key_heads > 0 and key.shape[2] % width == 0, "head-count-is-the-shape's", got)
    require(value.shape[2] % key_heads == 0, "head-width-fits", got)
    return [to_bnsd(x, layout, n) for x, n in ((query, heads), (key, key_heads), (value, key_heads))]


def require_heads(operator: str, heads: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    """``[B, N, S, D]`` or ``[T, N, D]``: head counts and widths fit."""
    got = (
        f"{operator} got {heads} heads with query {shape(query)}, key {shape(key)}, value {shape(value)} as B, N, S, D"
    )
    N, K = query.shape[1], key.shape[1]
    require(heads == N and N <= MOST_HEADS, "head-count-is-the-shape's", got)
    require(K > 0 and N % K == 0, "heads-are-a-multiple", got)
    require(key.shape[:-1] == value.shape[:-1], "keys-fit-values", got)
    D = query.shape[-1]
    require(D == key.shape[-1] >= value.shape[-1] and 1 <= D <= WIDEST, "head-width-fits", got)


def sequence_ends(operator: str, name: str, ends: Ends, tokens: int) -> list[int]:
    """Check the cumulative lengths of packed sequences: lengths 2, 3, 2 are ``[2, 5, 7]``."""
    got = f"{operator} got {name}={ends if ends is None else list(ends)} for {tokens} tokens"
    require(bool(ends), "lengths-are-given", got)
    own = [int(end) for end in ends or ()]
    require(own[0] != 0, "no-leading-zero", got)
    while len(own) > 1 and own[-1] == 0:  # trailing zeros are entries that take no part
        own.pop()
    require(len(own) <= MOST_SEQUENCES, "lengths-are-few-enough", got)
    require(own == sorted(own), "lengths-are-cumulative", got)
    require(own[-1] == tokens, "lengths-end-at-tokens", got)
    return own


def dropout(keep_prob: float, seed: int, offset: int) -> Callable[[Tensor], Tensor] | None:
    """Drop probabilities by a mask that seed and offset alone decide, so that the gradient sees the same one."""
    if keep_prob == 1.0:
        return None
    generator = torch.Generator().manual_seed((seed + offset * 2654435761) % 2**63)  # it takes the low 32 bits
    return lambda weight: weight * torch.empty_like(weight).bernoulli_(keep_prob, generator=generator) / keep_prob


def position_bias(
    operator: str, pse: Tensor, pse_type: int, scale: float, N: int, S: int
) -> Callable[[Tensor], Tensor]:
    """Add ``[B or 1, N, S or 1, keys]`` to the products: before the scale (type 1) or after it (type 0)."""
    require(pse_type in (0, 1), "no-reference", f"{operator} got pse_type={pse_type}")
    got = f"{operator} got pse {shape(pse)}"
    require(pse.dim() == 4 and pse.shape[1] == N and pse.shape[2] in (1, S), "no-reference", got)
    return lambda score: (score + pse.float()) * scale if pse_type else score * scale + pse.float()


def fusion_attention(
    operator: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    layout: str,
    band: Band,
    *,
    scale: float,
    keep_prob: float,
    seed: int,
    offset: int,
    q_ends: Ends,
    k_ends: Ends,
    pse: Tensor | None,
    pse_type: int,
    softmax_layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend as all versions do.

    Returns:
        Attention in the layout of the query; maximum and sum of the softmax, ``[B, N, S, 8]``, for TND ``[T, N, 8]``.
    """
    layout = layout.upper()
    require(layout in DIMENSIONS, "layout-is-known", f"{operator} got {layout}")
    tensors = {"query": query, "key": key, "value": value}
    got = ", ".join(f"{name} {shape(x)}" for name, x in tensors.items())
    require(
        all(x.dim() == DIMENSIONS[layout] for x in tensors.values()), "dimensions-fit", f"{operator} in {layout}: {got}"
    )
    require_dtypes(operator, FLOATS, {**tensors, "pse": pse})
    require(0 < keep_prob <= 1, "keep-prob-is-a-probability", f"{operator} got {keep_prob}")
    dense = layout != "TND"
    known = range(7) if dense else (0, 1, 2, 3, 4, 6, 7, 8)
    require(band.mode in known, "mode-is-known", f"{operator} got sparse_mode={band.mode} in {layout}")
    require(band.mode <= 4, "no-reference", f"{operator} got sparse_mode={band.mode}")
    if band.mask is not None:
        require(band.mask.dtype in (torch.bool, torch.uint8), "mask-is-bool", f"{operator} got {band.mask.dtype}")
    require_band(operator, band)
    wants = softmax_layout in ("", "TND") and not (dense and softmax_layout)
    require(wants, "layout-is-known", f"{operator} got softmax_layout={softmax_layout!r} in {layout}")
    keep = dropout(keep_prob, seed, offset)
    if dense:
        require(q_ends is None and k_ends is None, "lengths-are-given", f"{operator} got lengths in {layout}")
        Q, K, V = split_heads(operator, layout, heads, query, key, value)
        require(Q.shape[0] == K.shape[0] == V.shape[0], "keys-fit-values", f"{operator} in {layout}: {got}")
    else:
        Q, K, V = query, key, value
    require_heads(operator, heads, Q, K, V)
    require(scale != 1.0 or Q.shape[-1] == 1, "scale-is-passed", f"{operator} got 1.0 with D={Q.shape[-1]}")
    if not dense:
        require(pse is None, "no-reference", f"{operator} got pse in TND")
        return _packed(operator, Q, K, V, band, scale, keep, q_ends, k_ends, softmax_layout)
    B, N, S = Q.shape[:3]
    require_alignment(operator, S, K.shape[2], band)
    bias = None if pse is None else position_bias(operator, pse, pse_type, scale, N, S)
    hide = hidden(operator, S, K.shape[2], band)
    if hide is not None and band.mask is not None and band.mode in (0, 1):
        takes = hide.dim() == 2 or tuple(hide.shape[:-2]) in ((1, 1), (B, 1), (B, N))
        require(takes, "mask-shape", f"{operator} got atten_mask {shape(band.mask)}: not BNSS, B1SS, 11SS or SS")
    require_keys(operator, hide, band, (2,))
    out, highest, total = softmax_attention(Q, K, V, hide, scale, bias, keep)
    return from_bnsd(out, layout), *(x.expand(B, N, S, 8).contiguous() for x in (highest, total))


def require_alignment(operator: str, S: int, keys: int, band: Band) -> None:
    """Version 2 alone forbids more queries than keys in mode 3."""
    fits = operator != "npu_fusion_attention_v2" or band.mode != 3 or keys >= S
    require(fits, "queries-fit-keys", f"{operator} got {S} queries, {keys} keys")


def _packed(
    operator: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    band: Band,
    scale: float,
    keep: Callable[[Tensor], Tensor] | None,
    q_ends: Ends,
    k_ends: Ends,
    softmax_layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend sequence by sequence: ``[T, N, D]``."""
    counts = [len(ends or ()) for ends in (q_ends, k_ends)]
    require(counts[0] == counts[1], "lengths-are-equally-many", f"{operator} got {counts[0]} and {counts[1]}")
    own_q = sequence_ends(operator, "actual_seq_qlen", q_ends, query.shape[0])
    own_k = sequence_ends(operator, "actual_seq_kvlen", k_ends, key.shape[0])
    if band.mask is not None:
        require(
            band.mask.dim() == 2, "mask-shape", f"{operator} got atten_mask {shape(band.mask)} in TND, which takes SS"
        )
    longest = [max(b - a for a, b in zip([0, *ends], ends)) for ends in (own_q, own_k)]
    if band.mask is not None and band.mode in (0, 1):
        got = f"{operator} got atten_mask {shape(band.mask)} for sequences of up to {longest[0]} and {longest[1]}"
        require(list(band.mask.shape) == longest, "mask-shape", got)
    parts = []
    for a, b, c, d in zip([0, *own_q], own_q, [0, *own_k], own_k, strict=False):
        S, keys = b - a, d - c
        own = band
        if band.mask is not None and band.mode in (0, 1):
            own = band._replace(mask=band.mask[:S, :keys])
        require_alignment(operator, S, keys, own)
        hide = hidden(operator, S, keys, own)
        require_keys(operator, hide, own, ())
        lone = [x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d])]
        parts.append([x[0] for x in softmax_attention(*lone, hide, scale, None, keep)])
    out, highest, total = (torch.cat(each, 1) for each in zip(*parts, strict=True))  # [N, T, …]
    N, T = out.shape[:2]
    statistics = [x.expand(N, T, 8) for x in (highest, total)]
    if softmax_layout == "TND":
        statistics = [x.transpose(0, 1) for x in statistics]
    return out.transpose(0, 1).contiguous(), *(x.reshape(T, N, 8) for x in statistics)  # by default NTD content


def _attend(operator: str, query: Tensor, key: Tensor, value: Tensor, heads: int, layout: str, options: dict[str, Any]):
    """Read the options of any version, forward or gradient, and attend. Returns attention, maximum, sum."""
    absent = ("prefix", "sink", "dropout_mask", "query_rope", "key_rope", "q_start_idx", "kv_start_idx")
    require_none(operator, {name: options.get(name) for name in absent})
    require(options["padding_mask"] is None, "padding-mask-is-none", f"{operator} got one")
    spelled = "pre_tokens", "next_tokens"
    before, after = (options[name if name in options else name.replace("tokens", "tockens")] for name in spelled)
    ends = [options["actual_seq_qlen"], options["actual_seq_kvlen"]]
    return fusion_attention(
        operator,
        query,
        key,
        value,
        heads,
        layout,
        Band(options["atten_mask"], options["sparse_mode"], before, after, options["inner_precise"]),
        scale=options["scale_value" if "scale_value" in options else "scale"],
        keep_prob=options["keep_prob"],
        seed=int(options["seed"] or 0),
        offset=int(options["offset"] or 0),
        q_ends=ends[0].tolist() if isinstance(ends[0], Tensor) else ends[0],
        k_ends=ends[1].tolist() if isinstance(ends[1], Tensor) else ends[1],
        pse=options["pse"],
        pse_type=options.get("pse_type", 1),
        softmax_layout=options["softmax_layout"],
    )


def _forward(operator: str, query: Tensor, options: dict[str, Any], **rest: Any) -> tuple[Any, ...]:
    """Return attention, maximum, sum, an empty tensor, and seed, offset and size of the dropout mask."""
    keep_prob, seed, offset = (options.get(name, 0) for name in ("keep_prob", "seed", "offset"))
    if keep_prob < 1 and not seed:  # 0 asks for a new mask
        seed = int(torch.randint(1, UNBOUNDED, ()))
    out, highest, total = _attend(operator, query, options={**options, "seed": seed, "offset": offset}, **rest)
    return out, highest, total, query.new_empty(0), seed, offset, highest.numel() if keep_prob < 1 else 0


def npu_fusion_attention(query, key, value, head_num, input_layout, **options):
    """Version 1: ``pre_tockens`` (sic), lengths as ints."""
    inputs = {"key": key, "value": value, "heads": head_num, "layout": input_layout}
    return _forward("npu_fusion_attention", query, options, **inputs)


def npu_fusion_attention_v2(query, key, value, head_num, input_layout, **options):
    """Version 2: ``pre_tokens``, and ``pse_type``."""
    inputs = {"key": key, "value": value, "heads": head_num, "layout": input_layout}
    return _forward("npu_fusion_attention_v2", query, options, **inputs)


def npu_fusion_attention_v3(query, key, value, head_num, input_layout, **options):
    """Version 3, for graphs: lengths, seed and offset are tensors, and the size of the mask is not returned."""
    inputs = {"key": key, "value": value, "heads": head_num, "layout": input_layout}
    *tensors, seed, offset, _ = _forward("npu_fusion_attention_v3", query, options, **inputs)
    return *tensors, torch.tensor(seed), torch.tensor(offset)


def _gradients(
    operator: str, query: Tensor, key: Tensor, value: Tensor, dy: Tensor, options: dict[str, Any], **rest: Any
):
    """Differentiate the version named ``operator``. Returns the gradients of query, key, value and pse (or empty)."""
    pse = options["pse"]
    given = [query, key, value] + ([] if pse is None else [pse])
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in given]
        bias = {} if pse is None else {"pse": leaves[3]}
        out = _attend(operator, *leaves[:3], options={**options, **bias}, **rest)[0]
        gradients = torch.autograd.grad(out, leaves, dy)
    return (*gradients, query.new_empty(0))[:4]


def npu_fusion_attention_grad(query, key, value, dy, head_num, input_layout, **options):
    """Gradients of query, key, value, pse and sink (empty)."""
    inputs = {"heads": head_num, "layout": input_layout}
    return *_gradients("npu_fusion_attention", query, key, value, dy, options, **inputs), query.new_empty(0)


def npu_fusion_attention_grad_v2(query, key, value, dy, head_num, input_layout, **options):
    """Gradients of query, key, value, pse, the two rope inputs and sink; the last three empty."""
    inputs = {"heads": head_num, "layout": input_layout}
    found = _gradients("npu_fusion_attention_v2", query, key, value, dy, options, **inputs)
    return *found, *(query.new_empty(0) for _ in range(3))


def npu_fusion_attention_grad_v3(query, key, value, dy, head_num, input_layout, **options):
    """Gradients of query, key, value, pse and sink (empty)."""
    inputs = {"heads": head_num, "layout": input_layout}
    return *_gradients("npu_fusion_attention_v3", query, key, value, dy, options, **inputs), query.new_empty(0)
