"""Whether a training that is about to begin fits the device that it begins on."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from osum_npu.config import Recipe
from osum_npu.models.speech_llm import SpeechLLM, SpeechLLMConfig
from osum_npu.planning.devices import Device, read_devices
from osum_npu.planning.estimate import How, cut, memory_by_part, plan_stage, trace_step
from osum_npu.planning.report import warnings
from osum_npu.planning.step import Speech

LARGE = 100e6
"""Parameters from which on a training is planned before it begins: that takes seconds, as loading it does."""


def present(device: torch.device) -> Device | None:
    """Return the figures of a device of this machine: its own memory, all else of the first of its kind in the table.

    Returns:
        ``None`` where the table has none of its kind, or torch cannot say how much memory it has.
    """
    known = next((one for one in read_devices().values() if one.backend == device.type), None)
    if known is None:
        return None
    if device.type == "cpu":
        return replace(known, memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    module = torch.get_device_module(device)
    return replace(known, memory=module.mem_get_info(device)[1]) if hasattr(module, "mem_get_info") else None


def fit_warnings(recipe: Recipe, model: SpeechLLM, dtype: torch.dtype, device: Device, devices: int) -> list[str]:
    """Return a line for each stage that will not fit a device, by the plan of a batch at a time; none for small models.

    It never raises: a plan that cannot be made is one of the lines.

    Args:
        recipe: of the run.
        model: that it trains, sharded or not.
        dtype: of the computation.
        device: of each process.
        devices: of the run.
    """
    if sum(p.numel() for p in model.parameters()) < LARGE:
        return []
    config = SpeechLLMConfig(**{**model.config.to_dict(), "llm": model.llm.config.to_dict(), "llm_path": None})
    longest = min(recipe.data.max_seconds, model.encoder.config.max_seconds, Speech().seconds)
    how, precision, found = How.of(recipe, devices, Speech(longest)), str(dtype).removeprefix("torch."), []
    try:
        with torch.random.fork_rng(devices=[]):  # the run draws the numbers that it would draw without a plan
            for stage in recipe.stages:
                count, _ = cut(stage, how)
                traced = trace_step(config, stage, dtype, device, how, count, 1)
                if sum(memory_by_part(traced, device, how, dtype).values()) > device.memory:
                    found.append(plan_stage(config, stage, precision, "this device", device, how))
    except Exception as fault:  # whatever an LLM of a new kind makes of tensors without numbers
        return [f"whether the run fits this device cannot be told: {fault}"]
    return warnings(found)
