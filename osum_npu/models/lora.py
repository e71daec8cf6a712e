"""LoRA on the LLM, by PEFT."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from osum_npu.models.dropout import Dropout
from osum_npu.strict import STRICT


@dataclass(frozen=True, config=STRICT)
class LoraSettings:
    """Low-rank updates of the LLM's projections; the defaults are OSUM's, which leaves ``up_proj`` alone."""

    rank: int = Field(default=8, ge=1, description="rank of the update")
    alpha: float = Field(default=32, gt=0, description="scale; the update is multiplied by alpha / rank")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="dropout in front of the update, in training")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"), description="names of linear layers"
    )


def add_lora(llm: nn.Module, settings: LoraSettings) -> None:
    """Put LoRA layers into ``llm``, in place, in float32, initialised to change nothing."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    from osum_npu.models.lora_linear import LoraLinear

    config = peft_config(settings)
    config._register_custom_module({nn.Linear: LoraLinear})
    inject_adapter_in_model(config, llm)
    for module in llm.modules():
        if isinstance(module, LoraLayer) and settings.dropout:
            module.lora_dropout.update({name: Dropout(settings.dropout) for name in module.lora_dropout})
    for name, parameter in llm.named_parameters():
        if is_lora(name):  # PEFT takes the LLM's dtype, in which small updates would be rounded away
            parameter.data = parameter.data.float()


def fold_lora(llm: nn.Module) -> None:
    """Add the updates to the weights they update, in place, and drop them: there is less to compute then."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(llm.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, child = name.rpartition(".")
            module.merge()
            setattr(llm.get_submodule(parent), child, module.get_base_layer())


def updated(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return ``weight + scale · up · down``, computed in float32, in the dtype of ``weight``.

    Args:
        weight: ``[out, in]``, of a linear layer.
        down: ``[rank, in]``, LoRA's A.
        up: ``[out, rank]``, LoRA's B.
        scale: alpha / rank.
    """
    return (weight.float() + (up.float() @ down.float()) * scale).to(weight.dtype)


def peft_config(settings: LoraSettings) -> Any:
    """Return the same settings as PEFT's ``LoraConfig``, for ``adapter_config.json`` too."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )


def is_lora(name: str) -> bool:
    """Whether a parameter of this name belongs to LoRA."""
    return ".lora_" in name
