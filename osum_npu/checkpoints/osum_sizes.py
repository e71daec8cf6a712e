"""What a checkpoint of OSUM should hold: sizes are told from its tensors, then every tensor is held to them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from osum_npu.checkpoints.conversion import misfits, same_bits
from osum_npu.checkpoints.osum_keys import (
    ADAPTER_POSITIONS,
    ALIASES,
    ENCODER_POSITIONS,
    MARKS,
    OWN_POSITIONS,
    SPEECH_HEADS,
    llm_prefix,
    reference_key,
)
from osum_npu.models.adapters import OsumAdapterConfig, interleaved_sinusoids
from osum_npu.models.lora import LoraSettings
from osum_npu.models.speech_llm import SpeechLLM, SpeechLLMConfig, make_config
from osum_npu.models.whisper import WhisperEncoderConfig, sinusoids

HEAD_WIDTH = 64
"""Channels of an attention head in every Whisper encoder."""
LORA_ALPHA = 32.0
"""OSUM's."""
CODEC_TOKENS = 4097
"""OSUM's, with their end."""
TABLE_TOLERANCE = 0.02
"""Of sines and cosines: bfloat16 has 0.004, and float32 loses as much at the far end of a long table."""


def read_sizes(
    state: Mapping[str, Tensor],
    sidecar: Mapping[str, Any],
    llm: dict[str, Any],
    encoder_heads: int | None,
    adapter_heads: int,
    lora_alpha: float | None,
) -> SpeechLLMConfig:
    """Tell a model's sizes from the shapes of its tensors; where shapes contradict each other, most of them decide."""

    def size(pattern: str, axis: int, default: int) -> int:
        return _most_common(
            [t.shape[axis] for key, t in state.items() if re.fullmatch(pattern, key) and t.ndim > axis], default
        )

    def layers(prefix: str, default: int) -> int:
        numbers = [int(found[1]) for key in state if (found := re.match(rf"{prefix}\.(\d+)\.", key))]
        return max(numbers) + 1 if numbers else default

    usual, usual_adapter = WhisperEncoderConfig(), OsumAdapterConfig()
    width = size(r"encoder\.(after_norm|encoders\.\d+\.norm\d)\.weight", 0, usual.width)
    encoder = WhisperEncoderConfig(
        n_mels=128 if size(r"encoder\.embed\.conv\.0\.weight", 1, usual.n_mels) == 128 else 80,
        width=width,
        layers=layers(r"encoder\.encoders", usual.layers),
        heads=_encoder_heads(width, encoder_heads, sidecar),
        max_frames=size(re.escape(ENCODER_POSITIONS), 1, usual.max_frames),
    )
    adapter = OsumAdapterConfig(
        layers=layers(r"speech_transformer\.encoders", usual_adapter.layers),
        heads=adapter_heads,
        feed_forward=size(
            r"speech_transformer\.encoders\.\d+\.feed_forward\.w_1\.weight", 0, usual_adapter.feed_forward
        ),
        max_positions=size(re.escape(ADAPTER_POSITIONS), 1, usual_adapter.max_positions),
    )
    lora = None
    if targets := dict.fromkeys(found[1] for key in state if (found := re.search(r"\.(\w+)\.lora_A\.", key))):
        lora = LoraSettings(
            rank=size(r".*\.lora_A\.default\.weight", 0, 1),
            alpha=lora_alpha or sidecar.get("lora_alpha") or LORA_ALPHA,
            dropout=sidecar.get("lora_dropout", LoraSettings().dropout),
            targets=tuple(targets),
        )
    return make_config(encoder, adapter, llm, lora)


def _most_common(sizes: Sequence[int], default: int) -> int:
    return Counter(sizes).most_common(1)[0][0] if sizes else default


def _encoder_heads(width: int, given: int | None, sidecar: Mapping[str, Any]) -> int:
    settings = sidecar.get("encoder_conf")
    heads = given or (settings.get("attention_heads") if isinstance(settings, dict) else None)
    if heads is None and width % HEAD_WIDTH == 0:
        return width // HEAD_WIDTH
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(
            f"the encoder is {width} wide, and how many heads it has stands in none of its tensors: wanted a number "
            f"that divides {width}, got {heads}; give it as --encoder-heads, or as encoder_conf.attention_heads in a "
            ".yaml beside the checkpoint"
        )
    return heads


def copied_keys(state: Mapping[str, Tensor], *, tied: bool) -> dict[str, str]:
    """List the keys that stand for another key's tensor."""
    prefix = llm_prefix(state)
    head = f"{prefix}lm_head.weight"
    tokens = {head: f"{prefix}model.embed_tokens.weight"} if tied and head in state else {}
    return tokens | {key: prefix + original for key, original in ALIASES.items() if key in state}


def find_faults(state: Mapping[str, Tensor], copies: Mapping[str, str], config: SpeechLLMConfig) -> list[str]:
    """Say what does not fit, a line for each key."""
    with torch.device("meta"):
        model = SpeechLLM(config)
    prefix, width = llm_prefix(state), config.encoder["width"]
    names = {name: tuple(t.shape) for name, t in model.state_dict().items() if name != OWN_POSITIONS}
    wanted = {reference_key(name, prefix): shape for name, shape in names.items()}
    head = next((head for head in SPEECH_HEADS if f"{head}.weight" in state), next(iter(SPEECH_HEADS)))
    rows = [(MARKS, 2), (f"{head}.weight", 0), (f"{head}.bias", 0)]
    counts = [state[key].shape[0] - marks for key, marks in rows if key in state and state[key].ndim]
    tokens = _most_common([count for count in counts if count > 0], CODEC_TOKENS)
    tables = {ENCODER_POSITIONS: sinusoids, ADAPTER_POSITIONS: interleaved_sinusoids}
    wanted |= {
        MARKS: (tokens + 2, names["marks"][1]),
        f"{head}.weight": (tokens, names["marks"][1]),
        f"{head}.bias": (tokens,),
        "ln_speech.weight": (width,),
        "ln_speech.bias": (width,),
        ENCODER_POSITIONS: (1, config.encoder["max_frames"], width),
        ADAPTER_POSITIONS: (1, config.adapter["max_positions"], width),
    }
    wanted |= {key: wanted[original] for key, original in copies.items()}
    tied = {f"{prefix}lm_head.weight"} if config.llm.get("tie_word_embeddings") else set()
    faults = misfits(state, wanted, {*tables, *copies, *tied})
    for key, table in tables.items():
        if key in state and tuple(state[key].shape) == wanted[key]:
            error = (state[key][0].float() - table(*wanted[key][1:])).abs().max()
            if not error <= TABLE_TOLERANCE:
                faults.append(f"{key} is off by {error:.2g}: wanted the sinusoids that the reference computes")
    for key, original in copies.items():
        one, other = state[key], state.get(original)
        if other is not None and one.shape == other.shape and not same_bits(one, other):
            faults.append(f"{key} holds other numbers than {original}: wanted a copy of it")
    return faults
