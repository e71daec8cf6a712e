"""Weights, gradients and optimiser states divided among the ranks: torch's FSDP2 (``fully_shard``), block by block.

A rank keeps its rows of every parameter. A block's parameters are gathered when it computes and dropped after it;
its gradients are added up over the ranks and divided again, so frozen weights cost neither gradients nor states.

All ranks have to meet in every block, so each computes equally often in a step: one with less data makes up for it by
:func:`blank_batch`, whose loss counts nothing; and one whose batch is text alone, while others hear something, hears a
moment of silence (:func:`with_silence`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from osum_npu.audio.read import SAMPLE_RATE
from osum_npu.data.collate import Batch
from osum_npu.models.adapters import AdapterBlock
from osum_npu.models.whisper import Block
from osum_npu.training.ranks import Ranks

_BLANK_SECONDS = 0.1


def shard(model: nn.Module, kind: Literal["full", "hybrid"], ranks: Ranks, dtype: torch.dtype) -> None:
    """Divide a model's parameters among the ranks, in place; they move to the ranks' device.

    Args:
        model: the same on every rank, on the CPU.
        kind: ``full`` divides among all ranks; ``hybrid`` among those of a node, and every node has all.
        ranks: more than one.
        dtype: of the computation. Parameters are gathered in it, gradients are added up in float32.

    Raises:
        ValueError: torch is too old, or nodes of a hybrid run have different numbers of ranks.
    """
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(f"sharding: {kind} needs torch 2.8 or newer, this is {torch.__version__}; set sharding: none")
    if kind == "hybrid":
        nodes = (ranks.size // ranks.per_node(), ranks.per_node())
        mesh = init_device_mesh(ranks.device.type, nodes, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(ranks.device.type, (ranks.size,), mesh_dim_names=("shard",))
    # autocast decides the dtypes of the computation, as it does without sharding; here only what is gathered
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    blocks = [m for m in model.modules() if isinstance(m, Block | AdapterBlock | GradientCheckpointingLayer)]
    for module in [*blocks, model]:
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
        # Losses are divided by the tokens of all ranks already. By default torch asks for the mean, which gloo takes
        # for the sum (pytorch issue 162338).
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Drop what was gathered for a computation that had no backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a norm of at most ``limit``; return the norm that they had, the same on every rank."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole_state(model: nn.Module, ranks: Ranks, left_out: Collection[str]) -> dict[str, Tensor]:
    """Gather a model's state dict, tensor by tensor, on the host of the rank that leads; the others get nothing.

    All ranks have to call this.

    Args:
        model: sharded or not.
        ranks: of the run.
        left_out: names that nobody needs.
    """
    whole = {}
    for name, tensor in model.state_dict().items():
        if name in left_out:
            continue
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if ranks.leads else tensor
        if ranks.leads:
            whole[name] = tensor
    return whole


def blank_batch(end: int, *, sound: bool) -> Batch:
    """Return a batch for a rank that has no data left in a step; it holds no example.

    Args:
        end: a token id.
        sound: whether it is about silence, or text alone.
    """
    blank = Batch(
        examples=[],
        wave_BS=torch.zeros(0, 0),
        samples=[],
        about=[0 if sound else None],
        prompts=[[end]],
        after=[[]],
        answers=[[end]],
        spellings=[],
        drawn=None,
        skipped=[],
    )
    return with_silence(blank) if sound else blank


def with_silence(batch: Batch) -> Batch:
    """Give a batch without sound a moment of silence to hear, which nobody asks about."""
    samples = round(_BLANK_SECONDS * SAMPLE_RATE)
    return replace(batch, wave_BS=torch.zeros(1, samples), samples=[samples], spellings=[""], drawn=None)
