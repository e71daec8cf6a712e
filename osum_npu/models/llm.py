"""The language model: any decoder of transformers, computing with this project's ops.

Shapes: B sequences, T positions, H heads, D head width, C channels.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from osum_npu import functional
from osum_npu.models import pangu

ATTENTION = "osum_npu"
"""Name under which transformers knows this project's attention."""

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
# By name, not by shape: BitNet's feed-forward, Falcon-H1's and others look alike and compute something else.
_NORMS = {f"{family}RMSNorm" for family in _FAMILIES}
_FEED_FORWARDS = {f"{family}MLP" for family in _FAMILIES}
_ATTENTIONS = {f"{family}Attention" for family in _FAMILIES}
_LAYERS = {f"{family}DecoderLayer" for family in _FAMILIES}


def _attention(
    _module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers asks for it; its boolean mask includes causality, no mask means causal.

    ``packed_lengths`` comes from :func:`decode_packed`.
    """
    if more := [name for name in ("softcap", "s_aux") if settings.get(name) is not None]:
        raise ValueError(f"this LLM's attention needs {more[0]!r}, which this project's has not; choose another LLM")
    query, key, value = (x.transpose(1, 2) for x in (query_BHTD, key_BHTD, value_BHTD))
    if (lengths := settings.get("packed_lengths")) is not None:
        packed = functional.packed_attention(query[0], key[0], value[0], lengths=lengths, causal=True, scale=scaling)
        return packed[None], None
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
        projections: Any = original
        self.gate_proj, self.up_proj = projections.gate_proj, projections.up_proj
        self.down_proj = projections.down_proj
        self.gate_up: Tensor | None
        self.register_buffer("gate_up", None, persistent=False)

    def merge(self) -> None:
        """Keep the weights of gate and up behind one another, so that one product computes both.

        Projections that are more than a matrix (a bias, LoRA) stay apart.
        """
        both = [each for each in (self.gate_proj, self.up_proj) if type(each) is nn.Linear and each.bias is None]
        if len(both) == 2:
            self.gate_up = torch.cat([each.weight.detach() for each in both])
            for each, weight in zip(both, self.gate_up.chunk(2)):
                each.weight.data = weight

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return ``[B, T, C]``."""
        if self.gate_up is None:
            gate, up = self.gate_proj(x_BTC), self.up_proj(x_BTC)
        else:
            gate, up = F.linear(x_BTC, self.gate_up).chunk(2, -1)
        return self.down_proj(functional.swiglu(gate, up))  # type: ignore[no-any-return]


def _attend(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Forward of an attention layer, by :func:`osum_npu.functional.rotary` and ``attention``."""
    settings.pop("position_ids", None)
    heads = (*hidden_states.shape[:-1], -1, self.head_dim)
    query_BTHD, key_BTKD, value_BTKD = (
        project(hidden_states).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    if hasattr(self, "q_norm"):
        query_BTHD, key_BTKD = self.q_norm(query_BTHD), self.k_norm(key_BTKD)
    cos_BTD, sin_BTD = position_embeddings
    query_BHTD = functional.rotary(query_BTHD, cos_BTD, sin_BTD).transpose(1, 2)
    key_BKTD = functional.rotary(key_BTKD, cos_BTD, sin_BTD).transpose(1, 2)
    value_BKTD = value_BTKD.transpose(1, 2)
    if past_key_values is not None:
        key_BKTD, value_BKTD = past_key_values.update(key_BKTD, value_BKTD, self.layer_idx)
    out_BTHD, _ = _attention(self, query_BHTD, key_BKTD, value_BKTD, attention_mask, self.scaling, **settings)
    return self.o_proj(out_BTHD.flatten(2)), None


def _decode_layer(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Tensor:
    """Forward of a decoder layer, by :func:`osum_npu.functional.add_rms_norm`."""
    out_BTC, _ = self.self_attn(self.input_layernorm(hidden_states), attention_mask=attention_mask, **settings)
    norm = self.post_attention_layernorm
    normed_BTC, sum_BTC = functional.add_rms_norm(out_BTC, hidden_states, norm.weight, norm.eps)
    return sum_BTC + self.mlp(normed_BTC)  # type: ignore[no-any-return]


def use_own_ops(llm: PreTrainedModel) -> PreTrainedModel:
    """Make a model of transformers compute with this project's ops, in place; weights and their names stay.

    Attention is replaced in any decoder; rotary positions, norms, feed-forwards and the sums between them in those
    families that are known to compute the same.
    """
    llm.set_attn_implementation(ATTENTION)
    for name, module in list(llm.named_modules()):
        parent, _, child = name.rpartition(".")
        kind = type(module).__name__
        if kind in _ATTENTIONS:
            module.forward = MethodType(_attend, module)
        elif kind in _LAYERS:
            module.forward = MethodType(_decode_layer, module)
        elif kind in _NORMS:
            setattr(llm.get_submodule(parent), child, RMSNorm(module.weight, module.variance_epsilon))
        elif kind in _FEED_FORWARDS and llm.config.hidden_act == "silu":
            setattr(llm.get_submodule(parent), child, GatedMLP(module))
    return llm


def decode_packed(llm: PreTrainedModel, x_1LC: Tensor, position_1L: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Run the layers of an LLM on sequences that lie end to end in one row; none sees another.

    Args:
        llm: made to use this project's ops.
        x_1LC: embeddings.
        position_1L: int64, the place of each within its sequence.
        lengths: of the sequences; they add up to L.

    Returns:
        ``[1, L, C]``, the last hidden states.

    Raises:
        ValueError: a sequence is longer than the window that the LLM's attention sees.
    """
    window = getattr(llm.config, "sliding_window", None)
    if window is not None and max(lengths) > window:
        raise ValueError(
            f"a sequence of {max(lengths)} positions is longer than the {window} that this LLM's attention sees: lower "
            "data.max_seconds"
        )
    # a mask of four axes is taken as it is: transformers makes none of its own, which would be L × L
    hidden_1LC: Tensor = llm.get_decoder()(
        inputs_embeds=x_1LC,
        attention_mask=x_1LC.new_empty(1, 1, 0, 0),
        position_ids=position_1L,
        use_cache=False,
        packed_lengths=lengths,
    ).last_hidden_state
    return hidden_1LC


@torch.no_grad()
def check_output_layer(llm: PreTrainedModel) -> None:
    """Make sure that the LLM's logits are its last hidden states times the weight of its output layer, and no more.

    Training computes the cross entropy from these two alone (:func:`osum_npu.functional.linear_cross_entropy`).

    Raises:
        ValueError: the output layer has a bias, or the LLM scales its logits or caps them (Cohere, Granite, Gemma).
    """
    head, training = llm.get_output_embeddings(), llm.training
    kind = f"this LLM ({llm.config.model_type}) cannot be trained here"
    if head.bias is not None:
        raise ValueError(f"{kind}: its output layer has a bias, which the loss would leave out; choose another LLM")
    # far out, where a cap shows: along the longest of some rows of the weight, to a logit of 1000
    length, row = max((float(row.square().sum()), row) for row in head.weight[:64].float())
    hidden_11C = (row * (1000 / length)).to(head.weight.dtype)[None, None]

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = hidden_11C
        return output

    hook = llm.get_decoder().register_forward_hook(replace)
    llm.eval()
    try:
        got = llm(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=head.weight.device), use_cache=False).logits
    finally:
        hook.remove()
        llm.train(training)
    want = head(hidden_11C)
    if not torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-2 * float(want.abs().max())):
        raise ValueError(f"{kind}: it scales or caps its logits, which the loss would leave out; choose another LLM")


def merge_projections(llm: nn.Module) -> None:
    """Make an LLM that no longer learns compute faster, in place; weights and their names stay."""
    for module in llm.modules():
        if isinstance(module, GatedMLP):
            module.merge()


def read_config(name_or_path: str) -> PreTrainedConfig:
    """Read the configuration of a decoder from a folder or a hub; code that may lie beside it is never run.

    Raises:
        OSError: there is none.
        ValueError: transformers does not know it, or a field of it is missing.
    """
    fields, _ = PreTrainedConfig.get_config_dict(name_or_path)
    if fields.get("model_type") == pangu.MODEL_TYPE:
        return pangu.llama_config(**fields)
    return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)


def build_llm(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a decoder with random weights from a transformers configuration (``model_type`` and sizes)."""
    settings = dict(config)
    model_type = settings.pop("model_type")
    make = pangu.llama_config if model_type == pangu.MODEL_TYPE else partial(AutoConfig.for_model, model_type)
    llm: PreTrainedModel = AutoModelForCausalLM.from_config(make(**settings), dtype=dtype)
    return use_own_ops(llm)


def load_llm(name_or_path: str, dtype: torch.dtype | Literal["auto"] = torch.float32) -> PreTrainedModel:
    """Load a released decoder from a folder or a hub; with dtype ``auto``, in that of its files.

    It is built on the meta device, and filled tensor by tensor. Where the dtype is that of the files, their bytes are
    mapped and not copied: the processes of a machine share them.

    Raises:
        ValueError: there is none of that name, or its files lack a tensor of it.
    """
    try:
        config = read_config(name_or_path)
        config.dtype = None  # it may say another than the files have
        llm: PreTrainedModel
        llm, found = AutoModelForCausalLM.from_pretrained(
            name_or_path, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the LLM {name_or_path!r} cannot be loaded: {error}; wanted a folder or a name on a hub "
            "(a model directory names its LLM in config.json, as llm_path)"
        ) from error
    if missing := sorted(found["missing_keys"]):
        more = ", ".join(sorted(found["unexpected_keys"])[:5]) or "nothing"
        raise ValueError(
            f"the weights of the LLM {name_or_path!r} lack {len(missing)} tensors of {type(llm).__name__}, among them "
            f"{', '.join(missing[:5])}; what they have besides: {more}"
        )
    return use_own_ops(llm)
