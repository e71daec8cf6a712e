"""Encoder weights from Whisper: openai's files and Hugging Face's folders."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from osum_npu.models.whisper import WhisperEncoder

_HF_NAMES = (
    (r"^layers\.(\d+)\.self_attn\.q_proj", r"blocks.\1.attn.query"),
    (r"^layers\.(\d+)\.self_attn\.k_proj", r"blocks.\1.attn.key"),
    (r"^layers\.(\d+)\.self_attn\.v_proj", r"blocks.\1.attn.value"),
    (r"^layers\.(\d+)\.self_attn\.out_proj", r"blocks.\1.attn.out"),
    (r"^layers\.(\d+)\.self_attn_layer_norm", r"blocks.\1.attn_ln"),
    (r"^layers\.(\d+)\.fc1", r"blocks.\1.mlp.0"),
    (r"^layers\.(\d+)\.fc2", r"blocks.\1.mlp.2"),
    (r"^layers\.(\d+)\.final_layer_norm", r"blocks.\1.mlp_ln"),
    (r"^layer_norm", "ln_post"),
    (r"^embed_positions\.weight", "positional_embedding"),
)


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pick the encoder out of a Whisper state dict, under this project's names.

    Args:
        state: of openai's ``Whisper`` or of Hugging Face's ``WhisperModel`` or ``WhisperForConditionalGeneration``.

    Raises:
        ValueError: there is no Whisper encoder in it.
    """
    prefix = next((p for p in ("model.encoder.", "encoder.") if f"{p}conv1.weight" in state), None)
    if prefix is None:
        raise ValueError("wanted the weights of a Whisper model (…encoder.conv1.weight), and found none")
    picked = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            own = name.removeprefix(prefix)
            for pattern, replacement in _HF_NAMES:
                own = re.sub(pattern, replacement, own)
            picked[own] = tensor
    return picked


def _read(source: str) -> dict[str, Tensor]:
    """Read the state dict of a whole Whisper model."""
    try:
        if Path(source).is_file():
            content = torch.load(source, map_location="cpu", weights_only=True)
            weights: dict[str, Tensor] = content.get("model_state_dict", content)
            return weights
        from transformers import WhisperModel

        return dict(WhisperModel.from_pretrained(source).state_dict())
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(
            f"no Whisper weights can be read from {source}: {error}; wanted a .pt file of openai-whisper, "
            "or a folder or hub name of Hugging Face"
        ) from error


def load_encoder(encoder: WhisperEncoder, source: str) -> None:
    """Load Whisper weights into an encoder, in place.

    The position table is computed, not learned; a file may hold a longer or shorter one than the encoder uses.

    Args:
        encoder: of the same size.
        source: an openai ``.pt`` file, or a Hugging Face folder or hub name.

    Raises:
        ValueError: missing, damaged, not a Whisper model, or of another size; says which tensors differ.
    """
    state = encoder_state(_read(source))
    state["positional_embedding"] = encoder.positional_embedding
    own = encoder.state_dict()
    faults = [f"{n} is missing" for n in own.keys() - state.keys()]
    faults += [f"{n} is not in this encoder" for n in state.keys() - own.keys()]
    faults += [
        f"{n} is {tuple(state[n].shape)}, wanted {tuple(own[n].shape)}"
        for n in own.keys() & state.keys()
        if own[n].shape != state[n].shape
    ]
    if faults:
        raise ValueError(f"{source} does not fit the encoder: {'; '.join(sorted(faults)[:8])}")
    encoder.load_state_dict(state)
