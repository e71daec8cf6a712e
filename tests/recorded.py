"""Recorded numbers of the original systems, from tests/golden or the folder that OSUM_GOLDEN_DIR names."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from whisper.model import sinusoids

from osum_npu.models.tokenizer import train_tokenizer

OWN = Path(__file__).parent / "golden"
FOLDER = Path(os.environ.get("OSUM_GOLDEN_DIR") or OWN)


def load_formula():
    """The module that makes weights and inputs and compares records; it lies beside the numbers."""
    path = next(folder / "formula.py" for folder in (FOLDER, OWN) if (folder / "formula.py").exists())
    spec = importlib.util.spec_from_file_location("golden_formula", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


F = load_formula()


def read(name):
    """One file of numbers; without it, the tests of a module are skipped."""
    if not (FOLDER / name).exists():
        pytest.skip(f"{FOLDER} has no {name}", allow_module_level=True)
    return F.load(FOLDER / name)


def interleaved(length, width):
    """Sines at even and cosines at odd channels, in float64."""
    angle = np.arange(length)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
    table = np.empty((length, width))
    table[:, 0::2], table[:, 1::2] = np.sin(angle), np.cos(angle)
    return torch.from_numpy(table).float()


def checkpoint(golden):
    """The state dict of an original checkpoint, as its training writes it."""
    state = {key: torch.from_numpy(F.weight(key, shape, golden["seed"])) for key, shape in golden["parameters"].items()}
    for key, (_, length, width) in golden["buffers"].items():
        table = sinusoids if key.startswith("encoder.") else interleaved
        state[key] = table(length, width)[None]
    state.update({alias: state[key] for alias, key in golden["aliases"].items()})
    return state


def write_llm(golden, folder, *, weights=True):
    """The folder of the base LLM; without weights, its configuration and a tokenizer."""
    settings = dict(golden["config"]["llm"])
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("type"), **settings))
    if weights:
        own = {
            key.removeprefix("llama_model.").removeprefix("base_model.model.").replace(".base_layer", ""): tensor
            for key, tensor in checkpoint(golden).items()
            if key.startswith("llama_model.") and ".lora_" not in key
        }
        llm.load_state_dict(own)
        llm.save_pretrained(folder)
    else:
        llm.config.save_pretrained(folder)
    train_tokenizer(["hello world"], [], 280).save_pretrained(folder)
    return folder
