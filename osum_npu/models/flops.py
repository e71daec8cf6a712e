"""Floating-point operations of a training step, by formula: what the model needs, however it is computed.

A multiplication with its addition counts as two. Counted are matrix products, convolutions and attention, as
``torch.utils.flop_counter`` does: attention in full, though half of a causal one is thrown away. Work that is done
again (activation checkpointing, flash attention's backward pass) is not counted, so that these numbers over the peak
of a device give MFU (Chowdhery et al., PaLM, 2022, appendix B).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from osum_npu.models.adapters import OsumAdapterConfig
from osum_npu.models.speech_llm import SpeechLLMConfig
from osum_npu.models.whisper import WhisperEncoderConfig


@dataclass(frozen=True)
class Work:
    """What one step computes."""

    frames: Sequence[int]
    """Mel frames of each utterance."""
    positions: Sequence[int]
    """Places in the LLM of each sequence; empty where adapter and LLM are left out."""
    labels: int = 0
    """Tokens whose logits are made."""
    spelled: bool = False
    """Whether the CTC head computes."""


@dataclass(frozen=True)
class Flops:
    """Operations of one part of the model."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def count_flops(config: SpeechLLMConfig, trainable: Collection[str], work: Work) -> dict[str, Flops]:
    """Count the operations of a step.

    Args:
        config: sizes of the model; ``config.llm`` must hold those of the LLM.
        trainable: parts that learn, as a stage names them.
        work: what is computed.

    Returns:
        By part: ``encoder``, ``adapter``, ``llm`` (without its updates), ``lora``, ``head``, ``ctc``.
    """
    encoder, adapter = WhisperEncoderConfig(**config.encoder), OsumAdapterConfig(**config.adapter)
    learns_encoder = "encoder" in trainable
    encoded = [_strided(frames, encoder.strides[:1]) for frames in work.frames]
    frames = [_strided(frames, encoder.strides) for frames in work.frames]
    counts = {"encoder": _encoder(encoder, encoded, frames, learns_encoder)}
    if work.spelled and config.ctc_units is not None:
        product = 2 * sum(frames) * encoder.width * (len(config.ctc_units) + 1)
        counts["ctc"] = Flops(product, product * (learns_encoder + ("ctc" in trainable)))
    if work.positions:
        sizes = _LLMSizes.of(config.llm)
        counts["adapter"] = _adapter(
            adapter, encoder.width, sizes.width, frames, learns_encoder, "adapter" in trainable
        )
        counts |= _llm(sizes, config.lora, work, trainable)
    return counts


def _strided(frames: int, strides: Sequence[int]) -> int:
    for stride in strides:
        frames = (frames - 1) // stride + 1
    return frames


def _encoder(config: WhisperEncoderConfig, first: Sequence[int], frames: Sequence[int], learns: bool) -> Flops:
    width, count = config.width, sum(frames)
    stem = 2 * sum(first) * 3 * config.n_mels * width
    blocks = config.layers * (24 * count * width**2 + 4 * width * sum(n * n for n in frames))
    rest = 2 * count * 3 * width**2 + blocks
    # features have no gradient, so the first convolution has none to hand on
    return Flops(stem + rest, (stem + 2 * rest) * learns)


def _adapter(
    config: OsumAdapterConfig, width: int, llm_width: int, frames: Sequence[int], through: bool, learns: bool
) -> Flops:
    """Count the adapter; ``through`` says whether the encoder wants a gradient from it."""
    convolutions = [
        2 * 3 * width**2 * sum(_strided(n, config.strides[: depth + 1]) for n in frames)
        for depth in range(len(config.strides))
    ]
    lengths = [_strided(n, config.strides) for n in frames]
    count = sum(lengths)
    block = 2 * count * (4 * width**2 + 2 * width * config.feed_forward) + 4 * width * sum(n * n for n in lengths)
    attention = 4 * width * sum(n * n for n in lengths) * config.layers
    rest = 2 * count * width**2 + config.layers * block + 2 * count * width * llm_width
    forward = sum(convolutions) + rest
    if not (through or learns):
        return Flops(forward)
    products = forward - attention
    to_input = products - (0 if through else convolutions[0])
    return Flops(forward, to_input + products * learns + 2 * attention)


@dataclass(frozen=True)
class _LLMSizes:
    width: int
    layers: int
    inner: int
    vocabulary: int
    query: int
    """Channels of all query heads."""
    key: int
    """Channels of all key heads."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> _LLMSizes:
        heads = config["num_attention_heads"]
        head = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            inner=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            query=heads * head,
            key=(config.get("num_key_value_heads") or heads) * head,
        )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Width in and out of each linear layer of a block."""
        return {
            "q_proj": (self.width, self.query),
            "k_proj": (self.width, self.key),
            "v_proj": (self.width, self.key),
            "o_proj": (self.query, self.width),
            "gate_proj": (self.width, self.inner),
            "up_proj": (self.width, self.inner),
            "down_proj": (self.inner, self.width),
        }


_FROM_INPUT = ("q_proj", "k_proj", "v_proj")
"""Layers of the first block that read the embeddings, which may want no gradient."""


def _llm(sizes: _LLMSizes, lora: dict[str, Any] | None, work: Work, trainable: Collection[str]) -> dict[str, Flops]:
    count = sum(work.positions)
    learns, updates = "llm" in trainable, "lora" in trainable
    into_embeddings = learns or "encoder" in trainable or "adapter" in trainable
    anything = into_embeddings or updates
    base = {name: 2 * count * one * other for name, (one, other) in sizes.projections.items()}
    attention = 4 * sizes.query * sum(n * n for n in work.positions)
    forward = sizes.layers * (sum(base.values()) + attention)
    backward = sizes.layers * (sum(base.values()) * (anything + learns) + 2 * attention * anything)
    if anything and not into_embeddings:
        backward -= sum(base[name] for name in _FROM_INPUT)
    head = 2 * work.labels * sizes.width * sizes.vocabulary
    counts = {"llm": Flops(forward, backward), "head": Flops(head, head * (anything + learns))}
    if lora is not None:
        down = {name: 2 * count * sizes.projections[name][0] * lora["rank"] for name in lora["targets"]}
        up = {name: 2 * count * sizes.projections[name][1] * lora["rank"] for name in lora["targets"]}
        added = sizes.layers * (sum(down.values()) + sum(up.values()))
        backward = added * (anything + updates)
        if anything and not into_embeddings:
            backward -= sum(down[name] for name in _FROM_INPUT if name in down)
        counts["lora"] = Flops(added, backward)
    return counts
