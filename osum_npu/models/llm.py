"""The language model: any decoder of transformers, computing with this project's ops.

Shapes: B sequences, T positions, H heads, D head width, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from osum_npu import functional

ATTENTION = "osum_npu"
"""Name under which transformers knows this project's attention."""

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
# By name, not by shape: BitNet's feed-forward, Falcon-H1's and others look alike and compute something else.
_NORMS = {f"{family}RMSNorm" for family in _FAMILIES}
_FEED_FORWARDS = {f"{family}MLP" for family in _FAMILIES}


def _attention(
    _module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers asks for it; its boolean mask includes causality, no mask means causal."""
    if more := [name for name in ("softcap", "s_aux") if settings.get(name) is not None]:
        raise ValueError(f"this LLM's attention needs {more[0]!r}, which this project's has not; choose another LLM")
    query, key, value = (x.transpose(1, 2) for x in (query_BHTD, key_BHTD, value_BHTD))
    mask_BTS = None if attention_mask is None else attention_mask[:, 0]
    causal = attention_mask is None and query.shape[1] > 1
    return functional.attention(query, key, value, causal=causal, mask_BTS=mask_BTS, scale=scaling), None


AttentionInterface.register(ATTENTION, _attention)
# Without this every 2-D mask would silently arrive as None, and left-padded batches would attend to padding.
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class RMSNorm(nn.Module):
    """Root-mean-square norm by :func:`osum_npu.functional.rms_norm`, sharing the weight of the norm it replaces."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return ``[B, T, C]``."""
        return functional.rms_norm(x_BTC, self.weight, self.eps)


class GatedMLP(nn.Module):
    """Feed-forward by :func:`osum_npu.functional.swiglu`, sharing the projections of the layer it replaces."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = original.gate_proj, original.up_proj, original.down_proj

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return ``[B, T, C]``."""
        return self.down_proj(functional.swiglu(self.gate_proj(x_BTC), self.up_proj(x_BTC)))  # type: ignore[no-any-return,operator]


def use_own_ops(llm: PreTrainedModel) -> PreTrainedModel:
    """Make a model of transformers compute with this project's ops, in place; weights and their names stay.

    Attention is replaced in any decoder, norms and feed-forwards in those families that are known to compute the same.
    """
    llm.set_attn_implementation(ATTENTION)
    for name, module in list(llm.named_modules()):
        parent, _, child = name.rpartition(".")
        kind = type(module).__name__
        if kind in _NORMS:
            setattr(llm.get_submodule(parent), child, RMSNorm(module.weight, module.variance_epsilon))
        elif kind in _FEED_FORWARDS and llm.config.hidden_act == "silu":
            setattr(llm.get_submodule(parent), child, GatedMLP(module))
    return llm


def build_llm(config: dict[str, Any]) -> PreTrainedModel:
    """Build a decoder with random weights from a transformers configuration (``model_type`` and sizes)."""
    settings = dict(config)
    llm: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings)
    )
    return use_own_ops(llm)


def load_llm(name_or_path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a released decoder from a folder or a hub.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        llm: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    except OSError as error:
        raise ValueError(
            f"the LLM {name_or_path!r} cannot be loaded: {error}; wanted a folder or a name on a hub "
            "(a model directory names its LLM in config.json, as llm_path)"
        ) from error
    return use_own_ops(llm)
