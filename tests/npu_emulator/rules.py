"""The rules of the fused operators, in words, and the error that names the broken one.

Hardware answers many wrong calls in silence, or fails at a later operator with a number. A reference refuses them at
once: ``[rule] sentence; operator got …``. The sentences stand here, so that a test, a person and the README read the
same words. Source, where none is named: the operator documentation in the torch_npu 2.13.0 wheel
(``torch_npu/_op_plugin_docs.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

RULES: dict[str, str] = {
    # Any operator
    "dtype-is-supported": "the operator does not compute in this dtype",
    "dtypes-agree": "the tensors must share one dtype",
    "dimensions-fit": "the shapes must be those of the operator and its layout",
    "one-device": "all tensors must be on one device; only lengths, seed and offset may stay on the host",
    "inference-only": "the operator has no gradient: call it under torch.no_grad, or the training operator instead",
    "no-reference": "this use has no reference in the emulator, so nothing is known about its result",
    "keyword-is-in-schema": "keyword arguments must have the names of the recorded schema",
    "schema-is-current": "the recorded schema must be that of the wheel",
    # Attention
    "layout-is-known": "input_layout must be one of the operator's layouts",
    "scale-is-passed": "the scale defaults to 1.0, not to 1/sqrt(D): pass it",
    "head-count-is-the-shape's": "the head counts must be those of the shapes; head_num is always that of the query",
    "heads-are-a-multiple": "the query heads must be a multiple of the key heads",
    "head-width-fits": "head widths must be query = key >= value, within the operator's limits",
    "keys-fit-values": "key and value must agree in all but the head width, and with the query in the batch",
    "keep-prob-is-a-probability": "keep_prob is 1 - dropout, in (0, 1]",
    "mode-is-known": "sparse_mode must be one of the layout's modes",
    "mask-is-bool": "atten_mask must be bool or uint8 (inference: or int8) with True = masked out",
    "mask-is-given": "sparse_mode 1 to 4 needs atten_mask: without it attention is full, not causal",
    "mask-is-compressed": "sparse_mode 2, 3 and 4 take the [2048, 2048] atten_mask, whatever the lengths are",
    "mask-is-upper-triangle": "sparse_mode 2, 3 and 4 take triu(ones(2048, 2048), 1): True strictly above the diagonal",
    "mask-shape": "atten_mask must have a shape that the layout and the mode take",
    "mask-true-is-masked-out": "True in atten_mask means masked out, the inverse of the bool mask of torch's attention",
    "causal": "in a decoder a query must not see later keys: sparse_mode 2 or 3 with the compressed mask",
    "not-causal": "an encoder sees all keys: no atten_mask, sparse_mode 0",
    "causal-alignment": "sparse_mode 2 counts from the top left corner, sparse_mode 3 from the bottom right",
    "row-sees-a-key": (
        "a query that sees no key needs inner_precise=2 (inference: 2 or 3), and is never allowed in TND; "
        "a mask with its sense inverted looks like this (True = masked out)"
    ),
    "band-needs-mask": "without atten_mask the pre and next tokens have no effect: attention is full",
    "band-fits-mask": "in sparse_mode 0 whatever lies outside pre and next tokens must be masked in atten_mask too",
    "band-is-not-empty": "pre and next tokens must enclose something",
    "queries-fit-keys": "sparse_mode 3 of npu_fusion_attention_v2 takes no more queries than keys",
    "padding-mask-is-none": "padding_mask is not supported by the operator: give atten_mask",
    "lengths-are-given": "TND needs actual_seq_qlen and actual_seq_kvlen; the dense layouts take none",
    "lengths-are-equally-many": "actual_seq_qlen and actual_seq_kvlen must have the same number of entries",
    "lengths-are-cumulative": "TND lengths are cumulative: each at least the one before",
    "no-leading-zero": "TND lengths have no leading 0: pass cu_seqlens[1:]",
    "lengths-end-at-tokens": "the last of the TND lengths must be the number of tokens",
    "lengths-are-few-enough": "TND takes at most 1024 sequences",
    "lengths-are-counts": "inference lengths are counts by batch entry, within the shape: one for all, or one each",
    "inputs-are-contiguous": "inference attention takes contiguous query, key and value: a transposed view is refused",
    "one-query-has-no-mode": "at query length 1 sparse_mode has no effect: limit the keys by actual_seq_lengths_kv",
    "sequences-stay-apart": "in TND no sequence sees another: the lengths say where each ends",
    "heads-are-grouped": "query head h reads key head h // (query heads / key heads)",
    # Norm, rotary, activation, loss
    "gamma-has-input-dtype": "gamma must have the dtype of the input: cast float32 weights of a norm, or the input",
    "gamma-fits-input": "gamma must have the last dimensions of the input",
    "gamma-multiplies": "the normalised input is multiplied by gamma",
    "epsilon-is-passed": "npu_rms_norm adds epsilon=1e-6 unless it is given; the keyword is not eps",
    "rotary-shape": "cos and sin must be 4-d, of the full head width, and broadcast as BNSD, BSND or SBND allow",
    "rotary-table-is-cosine": "cos and sin lie in [-1, 1]",
    "rotary-pairs": "half pairs channel i with i + D/2 (LLaMA, Qwen), interleave 2i with 2i + 1: cos and sin too",
    "rotary-mode-is-known": "rotary_mode must be half or interleave",
    "rotary-direction": "the turn is cos * x + sin * (-second, first): a swapped sign turns backwards",
    "swiglu-is-even": "the gated dimension must have an even size",
    "gate-comes-first": "npu_swiglu is silu(first half) * second half: cat([gate, up])",
    "gelu-is-known": "approximate must be none or tanh",
    "gelu-is-exact": "fast_gelu is x * sigmoid(1.702 x), which is not GELU, and tanh is an approximation",
    "target-is-a-class": "targets must be in [0, C): a negative ignore_index ignores nothing, filter the rows first",
    "loss-options-are-default": "with a gradient, mean takes no option, sum and none take no label smoothing",
    "zloss-is-off": "the z-loss of npu_cross_entropy_loss is not enabled",
    "reduction-is-known": "reduction must be mean, sum or none",
}  # fmt: skip
"""Every rule by its id."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of the training operators; float64 is not for the device."""


class Refused(RuntimeError):  # noqa: N818  it says what happened
    """A call that breaks a rule.

    Attributes:
        rule: id of the broken rule, a key of ``RULES``.
    """

    def __init__(self, rule: str, got: str) -> None:
        self.rule = rule
        super().__init__(f"[{rule}] {RULES[rule]}; {got}")


_suspended: ContextVar[bool] = ContextVar("suspended", default=False)


@contextmanager
def suspended() -> Iterator[None]:
    """Let calls pass that break a rule, as hardware may: for finding out which misreading gives a number."""
    token = _suspended.set(True)
    try:
        yield
    finally:
        _suspended.reset(token)


def require(holds: bool, rule: str, got: str) -> None:
    """Raise Refused unless the rule holds; ``got`` says what was got, by which operator."""
    if not holds and not _suspended.get():
        raise Refused(rule, got)


def require_dtypes(operator: str, allowed: Iterable[torch.dtype], tensors: dict[str, Tensor | None]) -> None:
    """All given tensors share one of the allowed dtypes."""
    got = {name: x.dtype for name, x in tensors.items() if x is not None}
    words = f"{operator} got " + ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in got.items())
    require(set(got.values()) <= set(allowed), "dtype-is-supported", words)
    require(len(set(got.values())) == 1, "dtypes-agree", words)


def require_none(operator: str, options: dict[str, object]) -> None:
    """No option is given for which there is no reference."""
    given = [name for name, value in options.items() if value is not None]
    require(not given, "no-reference", f"{operator} got {', '.join(given)}")


def shape(x: Tensor) -> str:
    """Write a shape as ``[2, 3]``."""
    return str(list(x.shape))
