"""In which dtype weights are held while they are trained with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from osum_npu.config import Stage
from osum_npu.models.lora import is_lora
from osum_npu.models.speech_llm import SpeechLLM


def llm_learns(stages: Iterable[Stage]) -> bool:
    """Whether any stage trains the base LLM, which then has to be held in float32 all along."""
    return any("llm" in stage.trainable for stage in stages)


def hold(model: nn.Module, llm_dtype: torch.dtype) -> None:
    """Hold the matrices of the base LLM in a dtype, and all else that is computed with in float32; in place.

    In the dtype of the computation this changes no loss and no gradient: autocast would round these matrices at every
    use, and :meth:`SpeechLLM.embed` the rows of the token table. It would not round norms, which stay as they are, nor
    what a layer of another kind does with its weights.

    Args:
        model: on any device, meta too; a whole Whisper has no LLM.
        llm_dtype: the dtype of the computation where no stage trains the LLM, else float32.
    """
    matrices = set()
    if isinstance(model, SpeechLLM):
        linear = [m for n, m in model.llm.named_modules() if type(m) is nn.Linear and not is_lora(n)]
        tokens = model.llm.get_input_embeddings()
        matrices = {id(module.weight) for module in [*linear, *([tokens] if type(tokens) is nn.Embedding else [])]}
    for parameter in model.parameters():
        dtype = llm_dtype if id(parameter) in matrices else torch.float32
        if parameter.dtype is not dtype:
            parameter.data = parameter.data.to(dtype)
