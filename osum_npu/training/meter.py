"""How fast a training is, where its time goes and what memory it takes, between two rows of the log.

Nothing here waits for the device: counts are integers of the host, and times on a device lie between events that are
read when a row is written.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from osum_npu.audio.mel import frame_count
from osum_npu.config import Stage
from osum_npu.data.collate import Batch
from osum_npu.data.loader import Step
from osum_npu.models.flops import Work, count_flops
from osum_npu.models.speech_llm import SpeechLLM, SpeechLLMConfig
from osum_npu.training.build import Trainee

PEAK = "OSUM_PEAK_TFLOPS"
"""Environment variable: what a device can do at most in the precision of the training, for MFU."""
MEASURED = (
    "audio_hours_per_hour",
    "label_tokens_per_second",
    "positions_per_second",
    "step_seconds",
    "slow_rank",
    "waiting_share",
    "host_memory_gib",
    "device_memory_gib",
    "tflops",
    "mfu",
)
"""Fields of a row that depend on the machine, so that two runs of one recipe differ in them."""
_SIZES = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
"""What the count of operations needs to know of an LLM."""


class Meter:
    """Counts this rank's work of a stage; a row of the log holds that of all ranks."""

    def __init__(self, model: Trainee, stage: Stage, device: torch.device) -> None:
        """Begin.

        Args:
            model: what learns.
            stage: in which stage.
            device: of this process.
        """
        self.model, self.stage, self.device = model, stage, device
        self.sizes = _sizes(model)
        self.peak = read_peak()
        self.begin()

    def begin(self) -> None:
        """Count from nothing."""
        self.began = time.perf_counter()
        self.steps = self.label_tokens = self.positions = 0
        self.sound = self.waited = self.flops = 0.0
        self.marks: list[tuple[Any, Any]] = []

    def timed(self, feed: Iterator[Step]) -> Iterator[Step]:
        """Hand on the steps; note how long each let the training wait."""
        while True:
            began = time.perf_counter()
            step = next(feed)
            self.waited += time.perf_counter() - began
            self.steps += 1
            yield step

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Note how long the block's work takes on the device; work of other ranks is to stay outside."""
        began = self._mark()
        yield
        self.marks.append((began, self._mark()))

    def _mark(self) -> Any:
        """Return a moment of the device."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.get_device_module(self.device).Event(enable_timing=True)
        event.record()
        return event

    def count(self, batch: Batch) -> None:
        """Count the work of a batch."""
        self.sound += batch.seconds
        spelled = bool(self.stage.ctc_weight)
        frames = [frame_count(n) for n in batch.samples]
        positions: list[int] = []
        if self.stage.llm_weight:
            self.label_tokens += batch.label_count
            positions = _positions(self.model, frames, batch)
            self.positions += sum(positions)
        if self.sizes is not None:
            labels = batch.label_count if positions else 0
            work = Work(frames, positions, labels, spelled)
            counts = count_flops(self.sizes, self.stage.trainable, work)
            self.flops += sum(part.total for part in counts.values())

    def read(self) -> dict[str, float]:
        """Return this rank's numbers since :meth:`begin`; on a device, its work must be done."""
        pairs = [(a, b) if isinstance(a, float) else (0.0, a.elapsed_time(b) / 1000) for a, b in self.marks]
        numbers = {
            "elapsed": time.perf_counter() - self.began,
            "steps": self.steps,
            "waited": self.waited,
            "computed": sum(b - a for a, b in pairs),
            "sound": self.sound,
            "label_tokens": self.label_tokens,
            "positions": self.positions,
            "flops": self.flops,
            "host_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # Linux counts it in KiB
        }
        if self.device.type != "cpu":
            used = torch.get_device_module(self.device).max_memory_allocated(self.device)
            numbers["device_memory"] = used / 2**30
        return numbers

    def row(self, ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return fields of a row of the log.

        Args:
            ranks: what :meth:`read` returned on each rank.

        Returns:
            Fields named in :data:`MEASURED`; ``waiting_share`` and memory are those of the worst rank, ``tflops`` is
            the mean of a device.
        """
        total = {name: sum(numbers[name] for numbers in ranks) for name in ranks[0]}
        seconds = ranks[0]["elapsed"]
        row = {
            "audio_hours_per_hour": total["sound"] / seconds,
            "label_tokens_per_second": total["label_tokens"] / seconds,
            "positions_per_second": total["positions"] / seconds,
            "step_seconds": seconds / ranks[0]["steps"],
            "waiting_share": max(numbers["waited"] / numbers["elapsed"] for numbers in ranks),
            "host_memory_gib": max(numbers["host_memory"] for numbers in ranks),
        }
        if "device_memory" in total:
            row["device_memory_gib"] = max(numbers["device_memory"] for numbers in ranks)
        if self.sizes is not None:
            row["tflops"] = total["flops"] / seconds / len(ranks) / 1e12
            if self.peak is not None:
                row["mfu"] = row["tflops"] / self.peak
        return row


def read_peak() -> float | None:
    """Read :data:`PEAK`.

    Raises:
        ValueError: it is no number above 0.
    """
    if not (text := os.environ.get(PEAK)):
        return None
    try:
        peak = float(text)
    except ValueError:
        peak = math.nan
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"{PEAK}={text!r}: wanted a number above 0, the 10¹² operations a second of one device")
    return peak


def _sizes(model: Trainee) -> SpeechLLMConfig | None:
    """Return the sizes by which operations are counted; ``None`` where there is no formula for the model."""
    if not isinstance(model, SpeechLLM):
        return None
    config, llm = model.config, model.llm.config.to_dict()
    if not llm.keys() >= _SIZES:
        return None
    return SpeechLLMConfig(config.encoder, config.adapter, llm, config.lora, config.ctc_units)


def _positions(model: Trainee, frames: Sequence[int], batch: Batch) -> list[int]:
    """Return how many positions each question takes in the LLM, or in the decoder."""
    texts = [sum(map(len, parts)) for parts in zip(batch.prompts, batch.after, batch.answers)]
    if not isinstance(model, SpeechLLM):
        return [length - 1 for length in texts]  # the last token predicts nothing
    speech = [model.speech_length(n) + 2 for n in frames]
    return [length + (0 if about is None else speech[about]) for length, about in zip(texts, batch.about)]
