"""Encoder, adapter and LLM on a device, against the same weights in float64 on the host.

The reference of the LLM is transformers' own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from osum_npu import parity
from osum_npu.comparison.formula import fill, tensor
from osum_npu.models.adapters import OsumAdapter, OsumAdapterConfig
from osum_npu.models.llm import use_own_ops
from osum_npu.models.whisper import WhisperEncoder, WhisperEncoderConfig
from osum_npu.parity import Record, Row

TOLERANCE: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 1e-4),
    torch.float16: (2e-2, 5e-1),
    torch.bfloat16: (1e-1, 2.0),
}
"""Allowed to values and to gradients of a few layers, the worst entry of the worst parameter. In half precision a ReLU
of the adapter may open that is shut in the reference, which changes single entries by more than they are."""

_FRAMES = (37, 90, 61)
"""Mel frames, or embeddings, of the utterances of a batch."""


class _Packed(nn.Module):
    """A module whose result is cut to the utterances, one behind the other: what padding holds means nothing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x_BTC: Tensor, lengths: list[int]) -> Tensor:
        out_BTC, length_B = self.module(x_BTC, torch.tensor(lengths, device=x_BTC.device))
        return torch.cat([row[:length] for row, length in zip(out_BTC, length_B)])


class _Logits(nn.Module):
    """An LLM on left-padded embeddings; logits of what is no padding."""

    def __init__(self, llm: nn.Module) -> None:
        super().__init__()
        self.llm = llm

    def forward(self, x_BTC: Tensor, lengths: list[int]) -> Tensor:
        longest = x_BTC.shape[1]
        place_BT = torch.arange(longest) - (longest - torch.tensor(lengths)[:, None])
        inside_BT = (place_BT >= 0).to(x_BTC.device)
        logits_BTV: Tensor = self.llm(
            inputs_embeds=x_BTC,
            attention_mask=inside_BT.long(),
            position_ids=place_BT.clamp(min=0).to(x_BTC.device),
            use_cache=False,
        ).logits
        return logits_BTV[inside_BT]


class _Case(NamedTuple):
    name: str
    mine: nn.Module
    theirs: nn.Module
    x_BTC: Tensor
    lengths: list[int]


def _cases() -> Iterator[_Case]:
    from transformers import AutoConfig, AutoModelForCausalLM

    frames = list(_FRAMES)
    mask_BT1 = (torch.arange(max(frames)) < torch.tensor(frames)[:, None])[..., None]
    encoder = _Packed(fill(WhisperEncoder(WhisperEncoderConfig(width=64, layers=2, heads=4, max_frames=50))))
    yield _Case("encoder", encoder, encoder, tensor("mel", 3, max(frames), 80) * mask_BT1, frames)
    adapter = _Packed(fill(OsumAdapter(OsumAdapterConfig(layers=2, feed_forward=128), 64, 96)))
    yield _Case("adapter", adapter, adapter, tensor("encoded", 3, max(frames), 64), frames)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 6}
    more = {"num_key_value_heads": 2, "vocab_size": 211, "max_position_embeddings": 128, "attn_implementation": "sdpa"}
    for family in ("qwen2", "qwen3"):
        plain = fill(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **more)))
        own = _Logits(use_own_ops(copy.deepcopy(plain)))
        yield _Case(f"llm {family}", own, _Logits(plain), tensor("embeddings", 3, max(frames), 96), frames)


def check_modules(dtype: torch.dtype, device: torch.device, record: Record) -> Iterator[Row]:
    """Yield one row a module.

    Args:
        dtype: of weights and input on the device.
        device: what is checked.
        record: gets values and gradients of the device.
    """
    for number, case in enumerate(_cases()):
        yield Row.measured(
            partial(_errors, case, dtype, device, record, f"modules/{case.name}/{parity.short(dtype)}/{number}"),
            level="modules",
            name=case.name,
            backend=device.type,
            provider=device.type,
            dtype=parity.short(dtype),
            case=f"{number}: batch of {list(case.lengths)}",
            tolerance=TOLERANCE[dtype],
        )


def _errors(case: _Case, dtype: torch.dtype, device: torch.device, record: Record, tag: str) -> tuple[float, float]:
    mine = copy.deepcopy(case.mine).to(dtype).to(device).eval()
    theirs = copy.deepcopy(case.theirs).to(dtype).double().eval()
    x_rounded = case.x_BTC.to(dtype)
    x_mine = x_rounded.to(device, copy=True).requires_grad_()
    x_theirs = x_rounded.double().requires_grad_()
    gotten, wanted = [mine(x_mine, case.lengths)], [theirs(x_theirs, case.lengths)]
    inputs = (dict(leaves(mine, x_mine)), dict(leaves(theirs, x_theirs)))
    errors = parity.compare(gotten, wanted, *inputs, [dtype], torch.Generator().manual_seed(0))
    parity.record_all(record, tag, gotten, inputs[0])
    return errors


def leaves(module: nn.Module, x: Tensor) -> Iterator[tuple[str, Any]]:
    """Yield what has a gradient, by name: the input and all parameters that were used."""
    yield "input", x
    yield from ((name, parameter) for name, parameter in module.named_parameters() if "embed_tokens" not in name)
