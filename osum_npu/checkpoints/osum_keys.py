"""Names of tensors in checkpoints of OSUM, OSUM-EChat and OSUM-Pangu, and in this project's models.

Source: ASLP-lab/OSUM and ASLP-lab/OSUM-Pangu, wenet/llm_asr/llmasr_model.py and wenet/transformer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MARKS = "speech_token_emded.weight"
"""Embeddings of the codec's tokens and of their end; the last two rows are speech begin and speech end."""
ENCODER_POSITIONS, ADAPTER_POSITIONS = "encoder.embed.pos_enc.pe", "speech_transformer.embed.pos_enc.pe"
"""Tables of sinusoids; computed, not learned."""
OWN_POSITIONS = "encoder.positional_embedding"
"""This project's table of the encoder, which a model directory holds."""
LLM_PREFIXES = ("llama_model.base_model.model.", "llama_model.")
"""Of the LLM's tensors: with LoRA, and without."""
SPEECH_HEADS = {"speaker_head": "<|endoftext|>", "speech_head": "<|im_end|>"}
"""The head for speech tokens is called so in OSUM, and so in OSUM-EChat and OSUM-Pangu; with the mark that ends an
answer of the first two. OSUM-Pangu's is its tokenizer's own."""
ALIASES = {"embed_tokens.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
"""Tensors of the LLM that the state dict holds a second time."""

_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "out": "out"}
_MODULES = {
    "encoder.embed.conv.0": "encoder.conv1",
    "encoder.embed.conv.2": "encoder.conv2",
    **{f"encoder.encoders.N.self_attn.linear_{k}": f"encoder.blocks.N.attn.{v}" for k, v in _PROJECTIONS.items()},
    "encoder.encoders.N.feed_forward.w_1": "encoder.blocks.N.mlp.0",
    "encoder.encoders.N.feed_forward.w_2": "encoder.blocks.N.mlp.2",
    "encoder.encoders.N.norm1": "encoder.blocks.N.attn_ln",
    "encoder.encoders.N.norm2": "encoder.blocks.N.mlp_ln",
    "encoder.after_norm": "encoder.ln_post",
    **{f"down_sample_2.conv.{3 * i + 1}": f"adapter.down.conv.{i}" for i in range(3)},
    "speech_transformer.embed.out.0": "adapter.embed",
    "speech_transformer.embed.out.1": "adapter.embed_norm",
    **{f"speech_transformer.encoders.N.self_attn.linear_{k}": f"adapter.blocks.N.{v}" for k, v in _PROJECTIONS.items()},
    "speech_transformer.encoders.N.feed_forward.w_1": "adapter.blocks.N.feed_forward.0",
    "speech_transformer.encoders.N.feed_forward.w_2": "adapter.blocks.N.feed_forward.2",
    "speech_transformer.encoders.N.norm1": "adapter.blocks.N.norm1",
    "speech_transformer.encoders.N.norm2": "adapter.blocks.N.norm2",
    "speech_transformer.after_norm": "adapter.after_norm",
    "speech_llama_proj": "adapter.projection",
}
"""The reference's modules, and this project's; N is the number of a block."""
_REFERENCE_MODULES = {ours: theirs for theirs, ours in _MODULES.items()}
_PANGU = re.compile(r".*\.self_attn\.o_proj\.(base_layer\.)?bias")
_NUMBER = re.compile(r"(?<=\.encoders\.)\d+|(?<=\.blocks\.)\d+")


def is_pangu(keys: Iterable[str]) -> bool:
    """Whether the LLM is openPangu, and so the system OSUM-Pangu: only its attention has a bias behind the heads."""
    return any(key.startswith(LLM_PREFIXES) and _PANGU.fullmatch(key) for key in keys)


def own_name(key: str) -> str | None:
    """Return the name in a :class:`SpeechLLM`'s state dict, or None where it has no such tensor."""
    for prefix in LLM_PREFIXES:
        if key.startswith(prefix):
            return f"llm.{key.removeprefix(prefix)}"
    return "marks" if key == MARKS else _translate(key, _MODULES)


def reference_key(name: str, llm_prefix: str) -> str:
    """Return the reference's key of what a :class:`SpeechLLM`'s state dict calls ``name``."""
    if name.startswith("llm."):
        return f"{llm_prefix}{name.removeprefix('llm.')}"
    key = MARKS if name == "marks" else _translate(name, _REFERENCE_MODULES)
    assert key is not None, name
    return key


def _translate(name: str, modules: Mapping[str, str]) -> str | None:
    module, _, leaf = name.rpartition(".")
    number, other = _NUMBER.search(module), modules.get(_NUMBER.sub("N", module))
    return other and f"{other.replace('.N.', f'.{number[0]}.') if number else other}.{leaf}"


def llm_prefix(keys: Iterable[str]) -> str:
    """Return what the LLM's keys begin with in a checkpoint."""
    return LLM_PREFIXES[0] if any(key.startswith(LLM_PREFIXES[0]) for key in keys) else LLM_PREFIXES[1]


def without_lora(key: str) -> str:
    """Return the key that a tensor of the LLM has in a checkpoint without LoRA."""
    if key.startswith(LLM_PREFIXES[0]):
        return LLM_PREFIXES[1] + key.removeprefix(LLM_PREFIXES[0]).replace(".base_layer", "")
    return key
