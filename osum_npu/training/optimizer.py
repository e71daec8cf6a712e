"""What learns in a stage, and how fast."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from osum_npu.config import Part, Stage
from osum_npu.models.lora import is_lora
from osum_npu.training.muon import Muon
from osum_npu.training.ranks import Ranks


def part_of(name: str) -> Part:
    """Return the part of the model that a parameter belongs to."""
    if name.startswith("llm."):
        return "lora" if is_lora(name) else "llm"
    first: dict[str, Part] = {"encoder": "encoder", "ctc_head": "ctc", "decoder": "decoder"}
    return first.get(name.split(".")[0], "adapter")


def freeze(model: nn.Module, stage: Stage) -> list[nn.Parameter]:
    """Make the stage's parts trainable and all others not; return what trains.

    Raises:
        ValueError: the model has no parameters of a part that the stage needs.
    """
    found = set()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        found.add(part)
        parameter.requires_grad_(part in stage.trainable)
    needed = {*stage.trainable, *(["ctc"] if stage.ctc_weight else [])}
    if absent := sorted(needed - found):
        raise ValueError(f"stage {stage.name!r} needs {', '.join(absent)}, which this model does not have")
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Optimizers:
    """AdamW and, where the stage asks for it, Muon for the weight matrices; stepped as one."""

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        adamw: Callable[..., torch.optim.Optimizer] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Take all trainable parameters of ``model``. Vectors (biases and norms) are not decayed.

        Args:
            model: what learns.
            stage: which parts of it, and how fast.
            adamw: a device's own, which keeps the memory of gradients; torch's by default.
            ranks: all of which learn the same, and share Muon's work; by default this one does all.
        """
        self.drops_gradients = adamw is None
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if stage.muon_learning_rate and p.ndim == 2 and _is_hidden(name)]
        by_muon = {id(p) for p in matrices}
        rest = [(name, p) for name, p in named if id(p) not in by_muon]
        tokens = [p for name, p in rest if _is_embedding(name)]
        others = [p for name, p in rest if not _is_embedding(name)]
        rate = stage.embedding_learning_rate or stage.learning_rate
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": stage.weight_decay},
            {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
            {"params": tokens, "weight_decay": stage.weight_decay, "lr": rate},
        ]
        make = adamw or partial(torch.optim.AdamW, fused=True)
        groups = [group for group in groups if group["params"]]
        settings = {"lr": stage.learning_rate, "betas": stage.betas, "eps": stage.eps}
        self.all: list[torch.optim.Optimizer] = [make(groups, **settings)]
        if matrices and stage.muon_learning_rate:
            self.all.append(Muon(matrices, stage.muon_learning_rate, ranks=ranks, weight_decay=stage.weight_decay))
        self.peaks = [[group["lr"] for group in one.param_groups] for one in self.all]

    def step(self, factor: float) -> None:
        """Update all parameters with ``factor`` times the stage's highest learning rates."""
        for one, peaks in zip(self.all, self.peaks):
            for group, peak in zip(one.param_groups, peaks):
                group["lr"] = peak * factor
            one.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for one in self.all:
            one.zero_grad(set_to_none=self.drops_gradients)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of all."""
        return [one.state_dict() for one in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Set the state of all."""
        for one, state in zip(self.all, states):
            one.load_state_dict(state)


def _is_embedding(name: str) -> bool:
    """Whether a parameter is the LLM's or the decoder's table of token embeddings, or its output layer."""
    return part_of(name) in ("llm", "decoder") and any(part in name for part in ("embed_tokens", "lm_head"))


def _is_hidden(name: str) -> bool:
    """Whether a matrix maps hidden states to hidden states: no table, no output layer, no low-rank factor."""
    return part_of(name) != "lora" and not any(
        part in name for part in ("embed_tokens", "embed_positions", "lm_head", "ctc_head", "marks")
    )


def schedule(stage: Stage, step: int) -> float:
    """Return the factor on the learning rates at a step of the stage, counted from 0."""
    warm = stage.warmup_steps
    if stage.schedule == "inverse_sqrt":
        done = max(step, 1)  # the original gives its first step the rate of the second one too
        return min(done / max(warm, 1), math.sqrt(max(warm, 1) / done))
    if step < warm:
        return (step + 1) / warm
    left = (stage.steps - step) / max(1, stage.steps - warm)
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[stage.schedule]
