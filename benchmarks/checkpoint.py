"""What a checkpoint costs at OSUM's size: bytes for each trainable parameter, and how long training stands still.

    python benchmarks/checkpoint.py [--large] [--folder FOLDER] [--saves 5]

A model of OSUM's shapes with Qwen2-7B, weights drawn at random; what is frozen is on device meta, for a checkpoint does
not hold it. LoRA alone learns, or with --large encoder, adapter and LoRA, as in OSUM's second stage (12 GB of memory).
Between the saves the host computes matrix products, as a training would: how much slower they are while a checkpoint is
written is printed too. What is written is removed in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from convert import QWEN2_7B
from torch import nn

from osum_npu.config import Stage
from osum_npu.launch import World
from osum_npu.models.adapters import OsumAdapterConfig
from osum_npu.models.lora import LoraSettings
from osum_npu.models.speech_llm import SpeechLLM, make_config
from osum_npu.models.whisper import WhisperEncoderConfig
from osum_npu.training.optimizer import Optimizers, freeze
from osum_npu.training.ranks import Ranks
from osum_npu.training.saver import Saver, checkpoints
from osum_npu.training.state import Progress, facts, tensors


def make(parts: tuple[str, ...]) -> tuple[SpeechLLM, Optimizers, int]:
    """Return a model whose ``parts`` have numbers, an optimiser that has made a step, and how many numbers learn."""
    llm = {**QWEN2_7B, "num_hidden_layers": 28}
    with torch.device("meta"):
        model = SpeechLLM(make_config(WhisperEncoderConfig(), OsumAdapterConfig(), llm, LoraSettings()))
    stage = Stage(name="all", trainable=parts, steps=1, learning_rate=1e-4)
    freeze(model, stage)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape).normal_(0, 0.02)))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.grad = torch.empty_like(parameter).normal_(0, 1e-3)
    optimizer = Optimizers(model, stage)
    optimizer.step(1.0)
    optimizer.zero_grad()
    return model, optimizer, sum(parameter.numel() for parameter in learning)


def products(until: float) -> float:
    """Multiply matrices until a time; return how many products a second were made."""
    a = torch.randn(512, 512)
    began, count = time.perf_counter(), 0
    while time.perf_counter() < until:
        a @ a
        count += 1
    return count / (time.perf_counter() - began)


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description="Measure what a checkpoint costs.")
    parser.add_argument("--large", action="store_true", help="encoder and adapter learn too")
    parser.add_argument("--folder", help="where to write (default: where temporary files go)")
    parser.add_argument("--saves", type=int, default=5, help="checkpoints to write (default: %(default)s)")
    options = parser.parse_args()
    parts = ("encoder", "adapter", "lora") if options.large else ("lora",)
    model, optimizer, count = make(parts)
    ranks, progress = Ranks(World(), "gloo", torch.device("cpu")), Progress()
    pauses, writes, rates = [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        saver = Saver(Path(folder), 1, ranks, print)
        saver.reserve(tensors(model, parts, optimizer, ranks))  # as training does after its first step
        saver.finish()
        free = products(time.perf_counter() + 2)
        for step in range(options.saves):
            began = time.perf_counter()
            saver.save(step, tensors(model, parts, optimizer, ranks), facts(progress, ranks, {}, {}))
            pauses.append(time.perf_counter() - began)
            rates.append(products(time.perf_counter() + 0.5))
            saver.finish()
            writes.append(time.perf_counter() - began)
        (newest,) = checkpoints(Path(folder))
        size = sum(path.stat().st_size for path in newest.iterdir())
    measured = {
        "parts": parts,
        "trainable": count,
        "bytes_per_trainable": round(size / count, 3),
        "pause_s": round(median(pauses), 3),
        "longest_pause_s": round(max(pauses), 3),
        "until_written_s": round(median(writes), 2),
        "speed_while_written": round(median(rates) / free, 2),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
