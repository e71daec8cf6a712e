"""A recipe's model by its sizes alone: weights are neither loaded nor made."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers.initialization import no_init_weights

from osum_npu.checkpoints.conversion import read_llm_config
from osum_npu.config import NewModel, PretrainedLLM, RandomLLM, Recipe, WhisperModel
from osum_npu.models.speech_llm import SpeechLLM, SpeechLLMConfig, lora_fields, make_config
from osum_npu.tasks import TASKS
from osum_npu.tasks.answer import STAMP_SECONDS

PUBLISHED = Path(__file__).with_name("published.yaml")
CTC_CLASSES = 1500
"""Classes of a CTC head, where the data, which decides, has not been read: at most 1000 words, and the characters."""


@cache
def published() -> dict[str, dict[str, Any]]:
    """Read the sizes of released LLMs by hub name."""
    table: dict[str, dict[str, Any]] = yaml.safe_load(PUBLISHED.read_text("utf-8"))
    return table


def llm_sizes(name_or_path: str) -> dict[str, Any]:
    """Return the configuration of an LLM: of its folder, of the table of released ones, or as a hub has it.

    Raises:
        ValueError: there is none of that name.
    """
    if not Path(name_or_path).is_dir() and name_or_path in published():
        return dict(published()[name_or_path])
    return read_llm_config(name_or_path)


def read_sizes(recipe: Recipe) -> SpeechLLMConfig:
    """Return the sizes of a recipe's model.

    A tokenizer that is yet to be learned is taken to reach its vocabulary, and a CTC head to have
    :data:`CTC_CLASSES` classes.

    Raises:
        ValueError: the model or its LLM is not there, or it is a whole Whisper.
    """
    settings = recipe.model
    if isinstance(settings, WhisperModel):
        raise ValueError("plan knows models with an LLM; a whole Whisper (model.kind: whisper) is not among them")
    if isinstance(settings, NewModel):
        units = [chr(0x4E00 + i) for i in range(CTC_CLASSES)] if settings.ctc else None
        return make_config(settings.encoder, settings.adapter, _new_llm(settings.llm), settings.lora, ctc_units=units)
    try:
        config: SpeechLLMConfig = SpeechLLMConfig.from_pretrained(settings.path)
    except OSError as error:
        raise ValueError(f"{settings.path} is no model directory: {error}") from error
    if config.llm_path is not None:
        config.llm, config.llm_path = llm_sizes(config.llm_path), None
    if settings.lora is not None and config.lora is None:
        config.lora = lora_fields(settings.lora)
    return config


def _new_llm(settings: RandomLLM | PretrainedLLM) -> dict[str, Any]:
    if isinstance(settings, PretrainedLLM):
        return llm_sizes(settings.path)
    labels = sum(len(task.labels) for task in TASKS.values())
    stamps = round(settings.longest_stamp / STAMP_SECONDS) + 1
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {**settings.config, **none, "vocab_size": settings.vocabulary + labels + stamps + 2}


def build_on_meta(config: SpeechLLMConfig) -> SpeechLLM:
    """Build the model without memory."""
    with torch.device("meta"), no_init_weights():
        model = SpeechLLM(config)
        model.llm.tie_weights()
    return model


def materialize(model: nn.Module) -> None:
    """Give every tensor of a model on the meta device memory of the host, in place; under fake tensors, none.

    Args:
        model: whose weights may be shared.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
