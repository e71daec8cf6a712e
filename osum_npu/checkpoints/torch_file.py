"""State dicts in ``.pt`` files: mapped, not read, so that a file may be larger than the memory."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from osum_npu.checkpoints.shards import as_bytes

_INSIDE = ("module", "model")
"""Where DeepSpeed's files, and those of other trainings, have the state dict."""


def read_torch_file(path: str | Path) -> dict[str, Tensor]:
    """Map the tensors of a state dict; their bytes are read when they are used.

    Args:
        path: a file of ``torch.save``: a state dict, or DeepSpeed's ``mp_rank_00_model_states.pt``.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    try:
        # a file of before torch 1.6 is no archive and cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(
            f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}; wanted a "
            "state dict written by torch.save, with nothing but tensors and plain values in it"
        ) from error
    for name in _INSIDE:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no state dict, but {type(content).__name__}")
    if odd := [name for name, tensor in content.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(
            f"{path} holds no state dict: {odd[0]!r} is no tensor, but {type(content[odd[0]]).__name__}; "
            f"a state dict may also lie in it under {' or '.join(map(repr, _INSIDE))}"
        )
    return content


def write_torch_file(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict; a tensor that stands under two names is stored once. The file appears whole or not at all."""
    alone = {id(tensor): _alone(tensor) for tensor in state.values()}
    part = path.with_name(path.name + ".part")
    try:
        torch.save({name: alone[id(tensor)] for name, tensor in state.items()}, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _alone(tensor: Tensor) -> Tensor:
    """Return the same memory as a tensor whose storage holds nothing else: torch.save writes whole storages."""
    if not tensor.numel():
        return tensor.clone()
    return torch.from_numpy(as_bytes(tensor).numpy()).view(tensor.dtype).view(tensor.shape)
