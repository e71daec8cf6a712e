"""Tensors that the ranks of a training write and read together, by ``torch.distributed.checkpoint``.

A folder holds a file of each rank, ``__RANK_0.distcp``, and ``.metadata``, which says what lies where. Whatever is read
is a tensor. torch writes ``.metadata`` as a pickle; here it is read by an unpickler that knows its few classes alone.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_CLASSES = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("builtins", "set")}
_ROOTS = ("pathlib", "pathlib._local")
"""Where ``.metadata`` takes its classes from."""

warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")  # one process is no fault


def _member(enumeration: Any, name: str) -> Enum:
    if isinstance(enumeration, type) and issubclass(enumeration, Enum):
        return enumeration[name]
    raise pickle.UnpicklingError(f"it takes {name} from {enumeration}, which no checkpoint needs")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # a member of an enum, as Python 3.11.2 and others pickle it
            return _member
        known = module in _MODULES or (module, name) in _CLASSES or (module in _ROOTS and name.endswith("Path"))
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        return metadata


def describe(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return shape (``size``) and dtype (``properties.dtype``) of all tensors in a folder, by name.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return dict(_Reader(folder).read_metadata().state_dict_metadata)  # type: ignore[arg-type]
    except Exception as error:  # a pickle raises anything
        raise ValueError(f"{folder / '.metadata'} cannot be read: {error}") from error


def read(folder: Path, into: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill tensors with what a folder holds under their names; a sharded tensor reads its own part alone.

    Args:
        folder: that :func:`write` has filled, with any number of ranks.
        into: whole or sharded; all ranks name the same, but for those that no other rank has.
        group: the ranks that read together; ``None`` for a process on its own.

    Raises:
        ValueError: a rank cannot read its part.
    """
    try:
        with torch.no_grad():
            load(into, storage_reader=_Reader(folder), process_group=group)
    except CheckpointException as error:
        raise ValueError(f"{folder} cannot be read: {_words(error)}") from error


def write(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write the tensors of all ranks into a folder that is there.

    Args:
        folder: the same for every rank.
        tensors: of this rank, on the host. A sharded one is named by all ranks, any other by one of them.
        group: the ranks that write together; ``None`` for a process on its own.

    Raises:
        OSError: a rank cannot write its part; every rank raises it.
    """
    try:
        save(dict(tensors), storage_writer=FileSystemWriter(folder), process_group=group)
    except CheckpointException as error:
        raise OSError(_words(error)) from error


def _words(error: CheckpointException) -> str:
    """Say what went wrong, and on which ranks."""
    faults = [f"rank {rank}: {fault[0]}" for rank, fault in sorted(error.failures.items())]
    return "; ".join(faults) if len(faults) > 1 else str(next(iter(error.failures.values()))[0])


def read_model(folder: Path) -> dict[str, Tensor]:
    """Read the weights that a training's checkpoint holds, by their names in the model.

    Raises:
        ValueError: the folder is no checkpoint, or cannot be read.
    """
    found = {name: about for name, about in describe(folder).items() if name.startswith("model.")}
    into = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in found.items()}
    read(folder, into)
    return {name.removeprefix("model."): tensor for name, tensor in into.items()}
