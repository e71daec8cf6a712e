"""Which rule a wrong number breaks: the known misreadings of an operator are tried, and one that gives it is named.

A wrong call may be legal. A mask the wrong way round, interleaved rotary channels, a gate behind its input: each gives
numbers of the right shape. :func:`explain` computes the reference under each misreading and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from npu_emulator import attention, references, schemas
from npu_emulator.rules import RULES, suspended

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference over root-mean-square up to which two results are the same."""

Named = dict[str, Any]
Reading = tuple[str, str, Named]
"""A rule, what was misread, and the arguments that the misreading amounts to."""


def error(got: Tensor, want: Tensor) -> float:
    """Return the largest difference over the root-mean-square of what is wanted; infinity for another shape."""
    if got.shape != want.shape:
        return float("inf")
    got, want = (x.detach().cpu().float() for x in (got, want))
    if not want.numel():
        return 0.0
    difference, scale = (got - want).abs().max(), want.square().mean().sqrt()
    return float(difference / scale) if scale else float(difference)


def explain(operator: str, got: Tensor, *args: Any, **kwargs: Any) -> str:
    """Say what went wrong in a computation that should have given an operator's first result.

    Args:
        operator: name, such as ``npu_fusion_attention``.
        got: the result in question.
        args: the right arguments, on the CPU.
        kwargs: more of them, by the names of the schema.

    Returns:
        ``""`` where the result is right; else ``[rule] sentence; what was misread``, or that nothing known gives it.
    """
    named = schemas.bind(operator, args, kwargs)
    tolerance = TOLERANCE[got.dtype]
    with torch.no_grad(), suspended():
        apart = error(got, _result(operator, named))
        if apart <= tolerance:
            return ""
        found = []
        for rule, words, other in READINGS[operator](named):
            try:
                found.append((error(got, _result(operator, other)), rule, words))
            except (RuntimeError, ValueError, IndexError):  # with the rules suspended it may not be computable at all
                continue
    closest = min(found, default=(float("inf"), "", ""))
    if closest[0] <= tolerance:
        return f"[{closest[1]}] {RULES[closest[1]]}; {operator}: {closest[2]} gives this result, to {closest[0]:.0e}"
    return f"{operator}: {apart:.0e} apart from the reference, and no known misreading gives this result"


def _result(operator: str, named: Named) -> Tensor:
    result = references.call(operator, **named)
    return result[0] if isinstance(result, tuple) else result


def _attention(named: Named) -> Iterator[Reading]:
    names = {key: next((name for name in choice if name in named), "") for key, choice in _SPELLINGS.items()}
    mask, mode, layout = named["atten_mask"], named["sparse_mode"], named["input_layout"].upper()
    query, key = named["query"], named["key"]
    axis = layout.index("S") if layout != "TND" else 0
    S, keys = query.shape[axis], key.shape[axis]
    if layout == "TND" and names["q_ends"]:
        S, keys = (max(b - a for a, b in zip([0, *named[n]], named[n])) for n in (names["q_ends"], names["k_ends"]))
    band = attention.Band(mask, mode, named[names["before"]], named[names["after"]], 2)
    full = {**named, "sparse_mode": 1, "inner_precise": 2}
    unmasked = {**named, "atten_mask": None, "sparse_mode": 0}
    yield "scale-is-passed", "a scale of 1.0", {**named, names["scale"]: 1.0}
    hide = attention.hidden("explain", S, keys, band)
    if hide is not None:
        inverted = "mask-true-is-masked-out", "the mask the other way round"
        yield *inverted, {**full, "atten_mask": ~hide}
        later = torch.ones(S, keys, dtype=torch.bool).triu(1)
        causal = bool((hide | ~later).all())
        yield ("causal" if causal else "mask-is-given"), "attention without the mask", unmasked
    else:
        later = torch.ones(S, keys, dtype=torch.bool).triu(1)
        yield "not-causal", "causal attention", {**full, "atten_mask": later}
    if mode in (2, 3):
        yield "causal-alignment", f"sparse_mode={5 - mode}", {**named, "sparse_mode": 5 - mode}
    heads, head_axis = named[names["heads"]], layout.find("N")
    if head_axis > 0 and key.shape[head_axis] != heads:
        tiled = {n: torch.cat([named[n]] * (heads // key.shape[head_axis]), head_axis) for n in ("key", "value")}
        other = {names["key_heads"]: heads} if names["key_heads"] else {}
        yield "heads-are-grouped", "query head h on key head h % K", {**named, **tiled, **other}
    if head_axis < 0:
        widths = [n for n in range(1, query.shape[2] + 1) if n != heads and query.shape[2] % n == 0]
        for other in widths:
            yield "head-count-is-the-shape's", f"{other} heads", {**named, names["heads"]: other}
    if layout == "TND":
        whole = {names["q_ends"]: [len(query)], names["k_ends"]: [len(key)]}
        yield "sequences-stay-apart", "one sequence of all tokens", {**named, **whole}
    elif names["q_ends"] and named[names["k_ends"]] is not None:
        yield "lengths-are-counts", "attention to all keys", {**named, names["q_ends"]: None, names["k_ends"]: None}


_SPELLINGS = {
    "scale": ("scale", "softmax_scale"),
    "heads": ("head_num", "num_heads", "num_query_heads"),
    "key_heads": ("num_key_value_heads",),
    "before": ("pre_tockens", "pre_tokens"),
    "after": ("next_tockens", "next_tokens"),
    "q_ends": ("actual_seq_qlen", "actual_seq_lengths"),
    "k_ends": ("actual_seq_kvlen", "actual_seq_lengths_kv"),
}
"""What the versions of attention call the same argument."""


def _rotary(named: Named) -> Iterator[Reading]:
    cos, sin, mode = named["r1"], named["r2"], named["rotary_mode"]
    other = "interleave" if mode == "half" else "half"
    yield "rotary-pairs", f"{other} instead of {mode}", {**named, "rotary_mode": other}
    width = cos.shape[-1] // 2
    if mode == "half":
        tables = [x[..., :width].repeat_interleave(2, -1) for x in (cos, sin)]
    else:
        tables = [torch.cat([x[..., ::2]] * 2, -1) for x in (cos, sin)]
    words = f"{other} instead of {mode}, tables too"
    yield "rotary-pairs", words, {**named, "rotary_mode": other, "r1": tables[0], "r2": tables[1]}
    yield "rotary-direction", "a turn backwards", {**named, "r2": -sin}


def _swiglu(named: Named) -> Iterator[Reading]:
    gate, up = named["input"].chunk(2, named["dim"])
    yield "gate-comes-first", "cat([up, gate])", {**named, "input": torch.cat((up, gate), named["dim"])}


def _norm(named: Named) -> Iterator[Reading]:
    yield "gamma-multiplies", "no gamma", {**named, "gamma": torch.ones_like(named["gamma"])}
    for epsilon in (1e-6, 1e-5, 1e-12):
        yield "epsilon-is-passed", f"epsilon={epsilon}", {**named, "epsilon": epsilon}


def _gelu(named: Named) -> Iterator[Reading]:
    other = "tanh" if named["approximate"] == "none" else "none"
    yield "gelu-is-exact", f"approximate={other}", {**named, "approximate": other}


READINGS: dict[str, Callable[[Named], Iterator[Reading]]] = {
    "npu_fusion_attention": _attention,
    "npu_fusion_attention_v2": _attention,
    "npu_fusion_attention_v3": _attention,
    "npu_fused_infer_attention_score": _attention,
    "npu_fused_infer_attention_score_v2": _attention,
    "npu_rotary_mul": _rotary,
    "npu_swiglu": _swiglu,
    "npu_rms_norm": _norm,
    "npu_add_rms_norm": _norm,
    "npu_gelu": _gelu,
}
"""By operator, its known misreadings."""
