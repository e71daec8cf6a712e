"""OSUM's adapter: from encoder frames of 20 ms to speech embeddings of 80 ms in the width of the LLM.

Shapes: F encoder frames and E speech embeddings of all utterances, end to end; P places, C channels, H width of the
LLM.
Source: ASLP-lab/OSUM, wenet/llm_asr (``down_sample_2``, ``speech_transformer``, ``speech_llama_proj``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from osum_npu import functional, packing
from osum_npu.models.dropout import Dropout
from osum_npu.models.whisper import Stride
from osum_npu.strict import STRICT


@dataclass(frozen=True, config=STRICT)
class OsumAdapterConfig:
    """Size of the adapter; the defaults are OSUM's. Its width is the encoder's."""

    layers: int = Field(default=4, ge=1, description="transformer blocks")
    heads: int = Field(default=4, ge=1, description="attention heads; must divide the encoder's width")
    feed_forward: int = Field(default=2560, ge=1, description="inner width of the feed-forward layers")
    max_positions: int = Field(default=5000, ge=1, description="longest output, in speech embeddings")
    strides: tuple[Stride, Stride, Stride] = Field(default=(1, 2, 2), description="of the three convolutions")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout after attention and feed-forward, in training")

    def length(self, frames: int) -> int:
        """Return how many speech embeddings come of ``frames`` encoder frames."""
        for stride in self.strides:
            frames = (frames - 1) // stride + 1
        return frames


def interleaved_sinusoids(length: int, width: int) -> Tensor:
    """Return ``[length, width]`` with sines at even and cosines at odd channels (Vaswani et al., 2017)."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * -(math.log(10_000) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class CausalDownsampling(nn.Module):
    """Three causal convolutions; with OSUM's strides 1, 2, 2, a quarter of the frames."""

    def __init__(self, width: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        convolutions = [nn.Conv1d(width, width, kernel_size=3, stride=stride) for stride in strides]
        for conv in convolutions:  # torch's default halves the signal three times and leaves the biases
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        self.conv = nn.ModuleList(convolutions)

    def forward(self, x_FC: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return ``[E, C]``; every output sees only frames up to its own place, of its own utterance."""
        places = packing.spaced(lengths, self.strides, 2, x_FC.device)
        x_1CP = places[0].spread(x_FC).T[None]
        for i, conv in enumerate(self.conv):
            if i:  # what a convolution makes of a gap would be seen by the next one
                x_1CP = x_1CP * x_1CP.new_zeros(places[i].count).index_fill_(0, places[i].index_T, 1)
            x_1CP = F.gelu(conv(F.pad(x_1CP, (2, 0))))
        return places[-1].take(x_1CP[0].T)


class AdapterBlock(nn.Module):
    """One pre-norm transformer block with ReLU; all projections have a bias."""

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, feed_forward), nn.ReLU(), nn.Linear(feed_forward, width))
        self.dropout = Dropout(dropout)

    def forward(self, x_EC: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Return ``[E, C]``."""
        y_EC = self.norm1(x_EC)
        query_EHD, key_EHD, value_EHD = (
            project(y_EC).unflatten(-1, (self.heads, -1)) for project in (self.query, self.key, self.value)
        )
        mixed_EHD = functional.packed_attention(query_EHD, key_EHD, value_EHD, lengths=lengths)
        x_EC = x_EC + self.dropout(self.out(mixed_EHD.flatten(1)))
        return x_EC + self.dropout(self.feed_forward(self.norm2(x_EC)))  # type: ignore[no-any-return]


class OsumAdapter(nn.Module):
    """Convolutions, a small transformer, a projection."""

    positions: Tensor

    def __init__(self, config: OsumAdapterConfig, width: int, llm_width: int) -> None:
        super().__init__()
        if width % config.heads:
            raise ValueError(f"adapter: the encoder's width {width} is not divisible by {config.heads} heads")
        self.config, self.width = config, width
        self.down = CausalDownsampling(width, config.strides)
        self.embed = nn.Linear(width, width)
        self.embed_norm = nn.LayerNorm(width)
        self.register_buffer("positions", interleaved_sinusoids(config.max_positions, width), persistent=False)
        self.blocks = nn.ModuleList(
            AdapterBlock(width, config.heads, config.feed_forward, config.dropout) for _ in range(config.layers)
        )
        self.after_norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, llm_width)

    def length(self, frames: int) -> int:
        """Return how many speech embeddings come of ``frames`` encoder frames."""
        return self.config.length(frames)

    def forward(self, x_FC: Tensor, lengths: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Adapt encoder frames.

        Args:
            x_FC: encoder output of all utterances, end to end.
            lengths: encoder frames of each utterance.

        Returns:
            (``[E, H]``, the utterances end to end; speech embeddings of each).
        """
        x_EC, out = self.down(x_FC, lengths), tuple(self.length(n) for n in lengths)
        x_EC = self.embed_norm(self.embed(x_EC)) * math.sqrt(self.width)
        x_EC = x_EC + self.positions[packing.positions(out, x_EC.device)].to(x_EC.dtype)
        x_EC, filled = packing.fill_up(x_EC, out)
        for block in self.blocks:
            x_EC = block(x_EC, filled)
        return self.projection(self.after_norm(x_EC[: sum(out)])), out
