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
from transformers import PreTrainedModel

from osum_npu import packing, parity
from osum_npu.comparison.formula import fill, tensor
from osum_npu.models.adapters import OsumAdapter, OsumAdapterConfig
from osum_npu.models.llm import decode_packed, use_own_ops
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


class _Values(nn.Module):
    """A module's values, without the lengths that come with them."""

    def __init__(self, module: nn.Module, *, packed: bool) -> None:
        super().__init__()
        self.module, self.packed = module, packed

    def forward(self, x_BTC: Tensor, lengths: list[int]) -> Tensor:
        x = packing.padded(lengths, x_BTC.shape[1], x_BTC.device).take(x_BTC.flatten(0, 1)) if self.packed else x_BTC
        values: Tensor = self.module(x, lengths)[0]
        return values


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


class _PackedLogits(nn.Module):
    """The same logits, computed as a training does: of sequences that lie end to end."""

    def __init__(self, llm: PreTrainedModel) -> None:
        super().__init__()
        self.llm = llm

    def forward(self, x_BTC: Tensor, lengths: list[int]) -> Tensor:
        longest, device = x_BTC.shape[1], x_BTC.device
        sequences = [row[longest - length :] for row, length in zip(x_BTC, lengths)]
        hidden_1LC = decode_packed(
            self.llm, torch.cat(sequences)[None], packing.positions(lengths, device)[None], tuple(lengths)
        )
        logits_LV: Tensor = self.llm.get_output_embeddings()(hidden_1LC[0])
        return logits_LV


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
    sizes_of_encoder = WhisperEncoderConfig(width=64, layers=2, heads=4, max_frames=50)
    encoder = _Values(fill(WhisperEncoder(sizes_of_encoder)), packed=False)
    yield _Case("encoder", encoder, encoder, tensor("mel", 3, max(frames), 80) * mask_BT1, frames)
    adapter = _Values(fill(OsumAdapter(OsumAdapterConfig(layers=2, feed_forward=128), 64, 96)), packed=True)
    yield _Case("adapter", adapter, adapter, tensor("encoded", 3, max(frames), 64), frames)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 6}
    more = {"num_key_value_heads": 2, "vocab_size": 211, "max_position_embeddings": 128, "attn_implementation": "sdpa"}
    for family in ("qwen2", "qwen3"):
        plain = fill(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **more)))
        own, x_BTC = use_own_ops(copy.deepcopy(plain)), tensor("embeddings", 3, max(frames), 96)
        yield _Case(f"llm {family}", _Logits(own), _Logits(plain), x_BTC, frames)
        yield _Case(f"packed llm {family}", _PackedLogits(own), _Logits(plain), x_BTC, frames)


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
