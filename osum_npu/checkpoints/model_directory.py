"""A finished model as a folder: weights, tokenizer, feature and generation settings, a card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from osum_npu.models.speech_llm import SpeechLLM
from osum_npu.models.whisper_encoder_decoder import WhisperEncoderDecoder

MAX_NEW_TOKENS = 200
"""Longest answer that generation makes unless told otherwise."""


def save_model(model: SpeechLLM | WhisperEncoderDecoder, tokenizer: Any, folder: Path, card: str) -> None:
    """Write a model directory; it appears whole or not at all, and replaces an older one.

    Args:
        model: what is saved; a whole Whisper becomes a folder of transformers.
        tokenizer: of its LLM or decoder.
        folder: to write.
        card: text of ``README.md``.
    """
    from transformers import GenerationConfig

    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if isinstance(model, SpeechLLM):  # a Whisper has written its own
        end = tokenizer.eos_token_id
        generation = GenerationConfig(
            eos_token_id=end, pad_token_id=tokenizer.pad_token_id or end, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        generation.save_pretrained(temporary)
    features = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": model.encoder.config.n_mels,
        "sampling_rate": 16000,
        "n_fft": 400,
        "hop_length": 160,
    }
    (temporary / "preprocessor_config.json").write_text(json.dumps(features, indent=2) + "\n", "utf-8")
    (temporary / "README.md").write_text(card, "utf-8")
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old)
    else:
        os.replace(temporary, folder)


def load_model(folder: str | Path) -> tuple[SpeechLLM, Any]:
    """Load a model directory.

    Returns:
        (model in evaluation mode on the CPU, tokenizer).

    Raises:
        ValueError: the folder is no model directory, or its weights do not fit.
    """
    from transformers import AutoTokenizer

    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is no model directory: it has no config.json; a finished run has one in OUT/model")
    return SpeechLLM.from_pretrained(folder), AutoTokenizer.from_pretrained(str(folder))
