"""What learns in a stage, and how fast."""

from __future__ import annotations

import math

import torch
from torch import nn

from osum_npu.config import Part, Stage
from osum_npu.models.lora import is_lora
from osum_npu.models.speech_llm import SpeechLLM


def part_of(name: str) -> Part:
    """Return the part of the model that a parameter belongs to."""
    if name.startswith("llm."):
        return "lora" if is_lora(name) else "llm"
    return {"encoder": "encoder", "ctc_head": "ctc"}.get(name.split(".")[0], "adapter")  # type: ignore[return-value]


def freeze(model: SpeechLLM, stage: Stage) -> list[nn.Parameter]:
    """Make the stage's parts trainable and all others not; return what trains.

    Raises:
        ValueError: the model has no parameters of a part that the stage wants to train.
    """
    found = set()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        found.add(part)
        parameter.requires_grad_(part in stage.trainable)
    if absent := [part for part in stage.trainable if part not in found]:
        raise ValueError(f"stage {stage.name!r} trains {', '.join(absent)}, which this model does not have")
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(parameters: list[nn.Parameter], stage: Stage) -> torch.optim.AdamW:
    """Make AdamW; vectors (biases and norms) are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, eps=1e-8, fused=True)


def learning_rate(stage: Stage, step: int) -> float:
    """Return the learning rate of a step of the stage, counted from 0."""
    warm = stage.warmup_steps
    if step < warm:
        return stage.learning_rate * (step + 1) / warm
    left = (stage.steps - step) / max(1, stage.steps - warm)
    factor = {
        "constant": 1.0,
        "linear": left,
        "cosine": 0.5 * (1 - math.cos(math.pi * left)),
        "inverse_sqrt": math.sqrt(max(warm, 1) / max(step + 1, 1)),
    }[stage.schedule]
    return stage.learning_rate * factor
