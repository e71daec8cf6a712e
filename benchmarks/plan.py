"""How well ``osum-npu plan`` predicts: peak memory and step time of six configurations, on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/plan.py

The constants of the device come from four other configurations. All ten were fixed before anything was measured.
Wanted on each of the six: within 15 % of the measured peak memory and within 25 % of the measured step time.
"""

from __future__ import annotations

from dataclasses import dataclass

WANTED_MEMORY, WANTED_TIME = 0.15, 0.25
"""Largest relative errors."""


@dataclass(frozen=True)
class Configuration:
    """Sizes of a model, what learns, and how much sound a step takes."""

    encoder: tuple[int, int, int]
    """Width, blocks, heads."""
    llm: tuple[int, int, int, int, int]
    """Width, layers, heads, key heads, inner width of the feed-forward layers."""
    vocabulary: int
    trainable: tuple[str, ...]
    lora: int
    """Rank; 0 for none."""
    precision: str
    batch_seconds: float
    utterance_seconds: float
    answer_tokens: int
    dropout: float = 0.0
    micro_batch_seconds: float | None = None


CALIBRATION = {
    "c1": Configuration(
        (256, 4, 4), (384, 6, 6, 2, 1024), 32000, ("encoder", "adapter", "lora"), 8, "float32", 60, 6, 24
    ),
    "c2": Configuration(
        (192, 6, 4), (320, 4, 5, 5, 1280), 8000, ("encoder", "adapter", "llm"), 0, "float32", 40, 4, 16, 0.1
    ),
    "c3": Configuration((320, 4, 5), (448, 6, 7, 7, 1536), 64000, ("adapter", "lora"), 16, "bfloat16", 80, 10, 40, 0.1),
    "c4": Configuration(
        (448, 3, 7), (576, 4, 9, 3, 1536), 16000, ("encoder", "adapter", "llm"), 0, "bfloat16", 50, 5, 20
    ),
}
"""What the constants of the device come from."""

CONFIGURATIONS = {
    "1": Configuration(
        (384, 6, 6), (512, 8, 8, 2, 1408), 151936, ("encoder", "adapter", "lora"), 8, "float32", 60, 5, 20
    ),
    "2": Configuration(
        (128, 4, 4), (256, 4, 4, 4, 768), 4096, ("encoder", "adapter", "llm"), 0, "float32", 120, 8, 32, 0.1
    ),
    "3": Configuration((512, 6, 8), (768, 6, 12, 4, 2048), 50000, ("adapter",), 0, "float32", 40, 10, 40),
    "4": Configuration((256, 8, 4), (512, 4, 8, 8, 2048), 4096, ("lora",), 16, "float32", 20, 3, 12, 0.1),
    "5": Configuration(
        (384, 4, 6), (640, 6, 10, 2, 1792), 100000, ("encoder", "adapter", "lora"), 8, "bfloat16", 90, 15, 60, 0.1
    ),
    "6": Configuration(
        (192, 4, 3), (384, 8, 6, 6, 1024), 20000, ("encoder", "adapter", "llm"), 0, "bfloat16", 100, 6, 24, 0.0, 50
    ),
}
"""What is predicted, then measured."""
