"""The mean of several checkpoints' weights, in float32, tensor by tensor.

Averaging the last checkpoints of a training is usual in speech recognition; Izmailov et al., 2018 (arXiv 1803.05407).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from osum_npu.checkpoints.conversion import misfits
from osum_npu.checkpoints.distributed import describe, read_model
from osum_npu.checkpoints.model_directory import replacement
from osum_npu.checkpoints.shards import read_weights, spooled, write_weights
from osum_npu.checkpoints.torch_file import read_torch_file, write_torch_file
from osum_npu.models.lora import is_lora
from osum_npu.models.speech_llm import peft_name

_CHUNK = 2**24
"""Numbers that are added at once."""
_STEMS = ("model", "adapter_model")
"""Files of a model directory that learn."""


def average(sources: Sequence[Path], target: Path) -> None:
    """Write the mean of checkpoints: a ``.pt`` file of ``.pt`` files, else a model directory.

    Args:
        sources: ``.pt`` files; or model directories and checkpoints of a run (``checkpoints/step_N``), which are
            completed by that run's ``model``. What is no weight is taken from the last.
        target: to write; a folder must not exist yet.

    Raises:
        ValueError: the sources are of different forms or sizes, or cannot be read.
    """
    files = [source.is_file() for source in sources]
    if any(files) != all(files):
        raise ValueError("wanted .pt files only, or folders only; got both")
    if all(files):
        like, read = _mean({str(source): read_torch_file(source) for source in sources})
        target.parent.mkdir(parents=True, exist_ok=True)
        with spooled(target.parent, like, read) as means:
            write_torch_file({name: means[name] for name in like}, target)
        return
    if target.exists():
        raise ValueError(f"{target} is there already: choose another folder, or remove it")
    last = _model_directory(sources[-1])
    _check_stage([source for source in sources if _is_checkpoint(source)])
    with replacement(target) as temporary:
        learned = shutil.ignore_patterns(*(f"{stem}[.-]*safetensors*" for stem in _STEMS))
        shutil.copytree(last, temporary, ignore=learned, dirs_exist_ok=True)
        for stem in _STEMS:
            if any(last.glob(f"{stem}.safetensors*")):
                write_weights(temporary, stem, *_mean({str(source): _weights(source, stem) for source in sources}))


def _check_stage(steps: Sequence[Path]) -> None:
    """Make sure that checkpoints hold the same weights; what one lacks had values then that are not known."""
    held = {step: {name for name in describe(step) if name.startswith("model.")} for step in steps}
    every = set().union(*held.values())
    for step, names in held.items():
        if lacking := sorted(every - names):
            raise ValueError(f"wanted checkpoints of one stage: {step} has not {lacking[0]}, which another has")


def _is_checkpoint(source: Path) -> bool:
    return (source / ".metadata").is_file()


def _model_directory(source: Path) -> Path:
    """Return the model directory of a source: itself, or ``model`` of the run that it is a checkpoint of."""
    folder = source.resolve().parents[1] / "model" if _is_checkpoint(source) else source
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source}: wanted a model directory in {folder}, as a finished run has it")
    return folder


def _weights(source: Path, stem: str) -> dict[str, Tensor]:
    """Map the tensors of a source under the names that they have in a model directory."""
    folder = _model_directory(source)
    stored = read_weights(folder, stem)
    if folder == source:
        return stored
    state = read_model(source)
    learned = {peft_name(name) if is_lora(name) else name: tensor for name, tensor in state.items()}
    return {name: learned.get(name, tensor) for name, tensor in stored.items()}


def _mean(states: Mapping[str, dict[str, Tensor]]) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """Return the first state for its shapes, and what computes the mean of one tensor."""
    first = next(iter(states.values()))
    shapes = {name: tuple(tensor.shape) for name, tensor in first.items()}
    whole = {name for name, tensor in first.items() if not tensor.is_floating_point()}
    for source, state in states.items():
        others = {name: tensor for name, tensor in state.items() if name not in whole}
        if faults := misfits(others, {name: shape for name, shape in shapes.items() if name not in whole}):
            raise ValueError("\n".join([f"{source} does not fit {next(iter(states))}:", *faults]))

    def read(name: str) -> Tensor:
        tensors = [state[name] for state in states.values()]
        if len(tensors) == 1 or name in whole:
            return tensors[-1]
        mean = torch.empty_like(first[name], memory_format=torch.contiguous_format)
        parts = zip(*(torch.split(tensor.reshape(-1), _CHUNK) for tensor in tensors))
        for place, (one, *more) in zip(torch.split(mean.view(-1), _CHUNK), parts):
            total = one.to(torch.promote_types(one.dtype, torch.float32), copy=True)
            for other in more:
                total += other
            place.copy_(total / len(tensors))
        return mean

    return first, read
