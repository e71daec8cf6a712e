"""The speech encoder: Whisper's, for utterances of any length.

Parameter names are openai-whisper's (``blocks.0.attn.query.weight``), so its state dicts load as they are.
Differences to the original: no padding at all, and each utterance is computed as if it were alone.

Shapes: B utterances, T frames of 10 ms, F encoder frames (of 20 ms with Whisper's strides) of all utterances, P places,
M mel bins, C channels, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from osum_npu import functional, packing
from osum_npu.models.dropout import Dropout
from osum_npu.strict import STRICT

Stride = Annotated[int, Field(ge=1, le=4)]


@dataclass(frozen=True, config=STRICT)
class WhisperEncoderConfig:
    """Size of the encoder; the defaults are Whisper-medium's, as in OSUM."""

    n_mels: Literal[80, 128] = Field(default=80, description="mel bins: 80, or 128 for large-v3")
    width: int = Field(default=1024, ge=8, multiple_of=2, description="channels")
    layers: int = Field(default=24, ge=1, description="transformer blocks")
    heads: int = Field(default=16, ge=1, description="attention heads; must divide width")
    max_frames: int = Field(default=1500, ge=1, description="longest input, in encoder frames")
    strides: tuple[Stride, Stride] = Field(
        default=(1, 2), description="of the two convolutions; Whisper's make encoder frames of 20 ms"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout after attention and feed-forward, in training")

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"encoder width {self.width} is not divisible by {self.heads} heads")

    @property
    def max_seconds(self) -> float:
        """Longest input in seconds."""
        return self.max_frames * math.prod(self.strides) / 100


def sinusoids(length: int, width: int) -> Tensor:
    """Return the position table ``[length, width]``: sines, then cosines, of wavelengths 2π to 10000·2π."""
    step = math.log(10_000) / (width // 2 - 1)
    angle = torch.arange(length)[:, None] * torch.exp(-step * torch.arange(width // 2))
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Attention(nn.Module):
    """Bidirectional self-attention; the key projection has no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x_FC: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Mix the frames of each utterance."""
        query_FHD, key_FHD, value_FHD = (
            project(x_FC).unflatten(-1, (self.heads, -1)) for project in (self.query, self.key, self.value)
        )
        mixed_FHD = functional.packed_attention(query_FHD, key_FHD, value_FHD, lengths=lengths)
        return self.out(mixed_FHD.flatten(1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One pre-norm transformer block with exact GELU."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.attn_ln = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp_ln = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x_FC: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Return ``[F, C]``."""
        x_FC = x_FC + self.dropout(self.attn(self.attn_ln(x_FC), lengths))
        return x_FC + self.dropout(self.mlp(self.mlp_ln(x_FC)))  # type: ignore[no-any-return]


class WhisperEncoder(nn.Module):
    """Two convolutions, sinusoidal positions, transformer blocks, a final norm."""

    positional_embedding: Tensor

    def __init__(self, config: WhisperEncoderConfig) -> None:
        super().__init__()
        self.config = config
        first, second = config.strides
        self.conv1 = nn.Conv1d(config.n_mels, config.width, kernel_size=3, stride=first, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, kernel_size=3, stride=second, padding=1)
        for conv in (self.conv1, self.conv2):  # torch's default would drown the features in the positions added to them
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        self.register_buffer("positional_embedding", sinusoids(config.max_frames, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(config.width)

    def length(self, frames: int) -> int:
        """Return how many encoder frames come of ``frames`` mel frames."""
        for stride in self.config.strides:
            frames = (frames - 1) // stride + 1
        return frames

    def forward(self, mel_BTM: Tensor, frames: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Encode.

        Args:
            mel_BTM: log-mel features; what lies behind an end is not looked at.
            frames: mel frames of each utterance, at least 1.

        Returns:
            (``[F, C]``, the utterances end to end; encoder frames of each).

        Raises:
            ValueError: an utterance is longer than the position table.
        """
        if self.length(max(frames)) > self.config.max_frames:
            raise ValueError(
                f"an utterance of {max(frames) / 100:.2f} s is too long for this encoder, which takes "
                f"{self.config.max_seconds:.2f} s: cut it, or raise model.encoder.max_frames and train"
            )
        x_FC, lengths = self.convolve(mel_BTM, frames)
        x_FC = x_FC + self.positional_embedding[packing.positions(lengths, x_FC.device)].to(x_FC.dtype)
        x_FC, filled = packing.fill_up(x_FC, lengths)
        for block in self.blocks:
            x_FC = block(x_FC, filled)
        return self.ln_post(x_FC[: sum(lengths)]), lengths

    def convolve(self, mel_BTM: Tensor, frames: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Compute what the blocks begin with: (``[F, C]``, encoder frames of each utterance)."""
        device = mel_BTM.device
        before, between, after = packing.spaced(frames, self.config.strides, 1, device)
        mel_PM = before.spread(packing.padded(frames, mel_BTM.shape[1], device).take(mel_BTM.flatten(0, 1)))
        x_1CP = F.gelu(self.conv1(mel_PM.T[None]))
        # Alone, an utterance ends in the convolution's zero padding: it must see the same zeros here.
        inside_P = x_1CP.new_zeros(between.count).index_fill_(0, between.index_T, 1)
        x_1CP = F.gelu(self.conv2(x_1CP * inside_P))
        return after.take(x_1CP[0].T), tuple(self.length(n) for n in frames)
