"""A finished model as a folder: weights, tokenizer, feature and generation settings, a card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from osum_npu.models.speech_llm import SpeechLLM
from osum_npu.models.whisper_encoder_decoder import WhisperEncoderDecoder

MAX_NEW_TOKENS = 200
"""Longest answer that generation makes unless told otherwise."""


def save_model(
    model: SpeechLLM | WhisperEncoderDecoder,
    tokenizer: Any,
    folder: Path,
    card: str,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model directory; it appears whole or not at all, and replaces an older one.

    Args:
        model: what is saved; a whole Whisper becomes a folder of transformers.
        tokenizer: of its LLM or decoder.
        folder: to write.
        card: text of ``README.md``.
        state: the weights, where the model itself does not hold them whole.
    """
    with replacement(folder) as temporary:
        write_companions(temporary, tokenizer, model.encoder.config.n_mels, card)
        model.save_pretrained(temporary, state)  # a Whisper has settings of its own for generation


def write_companions(folder: Path, tokenizer: Any, n_mels: int, card: str) -> None:
    """Write what a model directory holds beside configuration and weights."""
    from transformers import GenerationConfig

    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    generation = GenerationConfig(
        eos_token_id=end, pad_token_id=tokenizer.pad_token_id or end, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    generation.save_pretrained(folder)
    features = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": n_mels,
        "sampling_rate": 16000,
        "n_fft": 400,
        "hop_length": 160,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(features, indent=2) + "\n", "utf-8")
    (folder / "README.md").write_text(card, "utf-8")


@contextmanager
def replacement(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it then takes the place of ``folder``, unless an error ended the filling."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old)
    else:
        os.replace(temporary, folder)


def load_model(
    folder: str | Path, *, llm_dtype: torch.dtype | Literal["auto"] = torch.float32
) -> tuple[SpeechLLM, Any]:
    """Load a model directory.

    Args:
        folder: folder, or name on a hub.
        llm_dtype: of the base LLM; ``auto`` keeps that of its files. All other parts are float32.

    Returns:
        (model in evaluation mode on the CPU, tokenizer).

    Raises:
        ValueError: the folder is no model directory, or its weights do not fit.
    """
    from transformers import AutoTokenizer

    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is no model directory: it has no config.json; a finished run has one in OUT/model")
    model = SpeechLLM.from_pretrained(folder, llm_dtype=llm_dtype)
    return model, AutoTokenizer.from_pretrained(str(folder))


def end_ids(folder: str | Path) -> list[int] | None:
    """Return the ids that end an answer by ``generation_config.json``; ``None`` where it names none.

    Raises:
        ValueError: the file is damaged.
    """
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError as error:
        path = Path(folder) / "generation_config.json"
        if path.exists():
            raise ValueError(f"{path} is damaged: {error}") from error
        return None
    return [ids] if isinstance(ids, int) else ids
