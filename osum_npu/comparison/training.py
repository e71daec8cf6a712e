"""A small speech LLM on a device against the host: one batch's loss and gradients, and a short training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from osum_npu import op
from osum_npu.comparison.formula import fill, integers, tensor
from osum_npu.models.adapters import OsumAdapterConfig
from osum_npu.models.layout import Layout, lay_out
from osum_npu.models.speech_llm import SpeechLLM, make_config
from osum_npu.models.whisper import WhisperEncoderConfig
from osum_npu.parity import VANISHING, Record, Row, relative_error, short

TOLERANCE: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 5e-4),
    torch.float16: (1e-2, 3e-1),
    torch.bfloat16: (5e-2, 1.0),
}
"""Allowed to the loss of a batch and to its gradients, under autocast, the worst entry of the worst parameter: more
than to a module, as a CTC loss and all modules lie on the way."""
CURVE_TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Allowed to each loss of a training, relative to the reference's."""

_VOCABULARY = 97
_UTTERANCES = 4
_BATCHES = 4
"""Batches that a training goes round."""


@dataclass(frozen=True)
class Curve:
    """Losses of a training on a device and of the same on the host."""

    dtype: str
    device: list[float]
    reference: list[float]


@dataclass(frozen=True)
class _Batch:
    features_BTM: Tensor
    frames: list[int]
    prompts: list[list[int]]
    answers: list[list[int]]
    spellings: list[str]

    def layout(self, model: SpeechLLM) -> Layout:
        return lay_out(self.prompts, [model.speech_length(n) for n in self.frames], self.answers)


def _model() -> SpeechLLM:
    encoder = WhisperEncoderConfig(width=48, layers=2, heads=4, max_frames=64)
    llm = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    adapter = OsumAdapterConfig(layers=1, feed_forward=96)
    return fill(SpeechLLM(make_config(encoder, adapter, llm, None, ctc_units=list("abcdefgh"))))


def _batch(number: int) -> _Batch:
    frames = [40 + length for length in integers(f"frames {number}", 80, _UTTERANCES)]
    mask_BT1 = (torch.arange(max(frames)) < torch.tensor(frames)[:, None])[..., None]
    letters = [integers(f"spelling {number} {i}", 8, 5) for i in range(_UTTERANCES)]
    return _Batch(
        features_BTM=tensor(f"features {number}", _UTTERANCES, max(frames), 80) * mask_BT1,
        frames=frames,
        prompts=[integers(f"prompt {number} {i}", _VOCABULARY, 3 + i) for i in range(_UTTERANCES)],
        answers=[integers(f"answer {number} {i}", _VOCABULARY, 9 - i) for i in range(_UTTERANCES)],
        spellings=["".join("abcdefgh"[letter] for letter in row) for row in letters],
    )


def _loss(model: SpeechLLM, batch: _Batch, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the mean over labels and CTC units, as a training weighs them."""
    features_BTM = batch.features_BTM.to(device)
    if dtype is torch.float64:
        features_BTM = features_BTM.double()
    with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        output = model(features_BTM, batch.frames, batch.layout(model).to(device), batch.spellings)
    assert output.ctc_sum is not None
    loss: Tensor = output.loss_sum / output.label_count + 0.3 * output.ctc_sum / output.ctc_count
    return loss


def check_model(dtype: torch.dtype, device: torch.device, record: Record) -> Iterator[Row]:
    """Yield the row of one batch: its loss and the gradients of all parameters.

    Args:
        dtype: of the computation under autocast; weights stay in float32.
        device: what is checked.
        record: gets loss and gradients of the device.
    """
    batch = _batch(0)
    yield Row.measured(
        partial(_errors, batch, dtype, device, record),
        level="model",
        name="speech llm",
        backend=device.type,
        provider=device.type,
        dtype=short(dtype),
        case=f"0: batch of {batch.frames} frames",
        tolerance=TOLERANCE[dtype],
    )


def _errors(batch: _Batch, dtype: torch.dtype, device: torch.device, record: Record) -> tuple[float, float]:
    """Return the relative error of the loss, and the worst of the gradients."""
    theirs, mine = _model().double(), _model().to(device)
    want, got = _loss(theirs, batch, torch.device("cpu"), torch.float64), _loss(mine, batch, device, dtype)
    want.backward()  # type: ignore[no-untyped-call]
    got.backward()  # type: ignore[no-untyped-call]
    tag = f"model/speech llm/{short(dtype)}/0"
    record(f"{tag}/value0", got)
    gotten = {name: p.grad for name, p in mine.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    if gotten.keys() != wanted.keys():
        raise ValueError(f"gradients reach other parameters: {sorted(gotten.keys() ^ wanted.keys())}")
    sizes = {name: float(want.square().mean().sqrt()) for name, want in wanted.items()}
    largest, errors = max(sizes.values()), []
    for name, value in gotten.items():
        record(f"{tag}/gradient of {name}", value)
        difference = float((value.cpu().double() - wanted[name]).abs().max())
        errors.append(difference / (sizes[name] if sizes[name] >= VANISHING * largest else largest))
    return relative_error(got, want), float(torch.tensor(errors).max())


def train_both(dtype: torch.dtype, device: torch.device, steps: int, record: Record) -> tuple[Row, Curve]:
    """Train some steps by AdamW on the device and in float32 on the host, and compare the losses.

    Args:
        dtype: of the computation on the device, under autocast; weights stay in float32.
        device: what is checked.
        steps: how many.
        record: gets the losses of the device.
    """
    with op.references():
        theirs = list(_losses(torch.device("cpu"), torch.float32, steps))
    mine: list[float] = []

    def measure() -> tuple[float, float]:
        mine.extend(_losses(device, dtype, steps))
        record(f"run/training/{short(dtype)}/0/value0", torch.tensor(mine))
        return max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in zip(mine, theirs, strict=True)), 0

    row = Row.measured(
        measure,
        level="run",
        name="training",
        backend=device.type,
        provider=device.type,
        dtype=short(dtype),
        case=f"0: {steps} steps of AdamW",
        tolerance=(CURVE_TOLERANCE[dtype], 0.0),
    )
    return row, Curve(short(dtype), mine, theirs)


def _losses(device: torch.device, dtype: torch.dtype, steps: int) -> Iterator[float]:
    model = _model().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    batches = [_batch(number) for number in range(_BATCHES)]
    for step in range(steps):
        loss = _loss(model, batches[step % _BATCHES], device, dtype)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
