"""Writes checkpoints while training goes on, and finds the newest that is whole.

A checkpoint is a folder ``step_N``: tensors (:mod:`osum_npu.checkpoints.distributed`) and ``progress.json``, which
names all files with size and digest. It is written as ``step_N.part`` and renamed once every rank has written its part,
so it appears whole or not at all, whenever a process is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from osum_npu.checkpoints import distributed
from osum_npu.training.ranks import Ranks

T = TypeVar("T")
_FACTS = "progress.json"
_CHUNK = 2**22


class Saver:
    """Writes one checkpoint at a time, in a thread; training stands still only while tensors are copied to the host."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks, say: Callable[[str], None]) -> None:
        """Write nothing yet.

        Args:
            folder: of all checkpoints of the run; every rank sees the same.
            keep: how many checkpoints stay.
            ranks: all of which call every method of this.
            say: tells people what could not be written.
        """
        self.folder, self.keep, self.ranks, self.say = folder, keep, ranks, say
        self._group = ranks.host_group()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._wrote = False
        self._copies: dict[str, Tensor] = {}
        self._kinds: dict[str, tuple[Any, ...]] = {}

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to take memory for copies of tensors like these: new memory is slow, so the first save need not wait.

        Raises:
            ValueError: as :meth:`finish`.
        """
        self.finish()
        self._writing = self._thread.submit(self._allocate, dict(tensors))

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Begin to write ``step_N``, once the one before is written; older ones beyond ``keep`` are removed then.

        Args:
            step: of the run.
            tensors: of this rank; they may change as soon as this returns.
            facts: what else is kept, as JSON.

        Raises:
            ValueError: as :meth:`finish`.
        """
        self.finish()
        self._copy(tensors)
        self._writing = self._thread.submit(self._write, self.folder / f"step_{step:08d}", self._copies, dict(facts))

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors to the host, into the memory of the copies before where these were alike."""
        if {name: _kind(tensor) for name, tensor in tensors.items()} != self._kinds:
            self._allocate(tensors)
        for name, tensor in tensors.items():
            _local(self._copies[name]).copy_(_local(tensor), non_blocking=True)
        if self.ranks.device.type != "cpu":  # the copies may still be under way
            torch.get_device_module(self.ranks.device).synchronize()

    def _allocate(self, tensors: Mapping[str, Tensor]) -> None:
        self._copies = {}  # the memory of those before is given back first
        self._kinds = {name: _kind(tensor) for name, tensor in tensors.items()}
        self._copies = {name: _host_memory(tensor) for name, tensor in tensors.items()}

    def finish(self, *, needed: bool = False) -> None:
        """Wait until nothing is being written.

        A checkpoint that could not be written is said, and training may go on: the one before is still there. But
        the first one of a process has to succeed: nobody should find out after days that nothing could be kept.

        Args:
            needed: the run cannot do without this checkpoint.

        Raises:
            ValueError: the first checkpoint, or one that is needed, could not be written.
        """
        writing, self._writing = self._writing, None
        fault = writing.exception() if writing is not None else None
        if fault is None:
            return
        if not isinstance(fault, OSError):
            raise fault
        message = f"a checkpoint could not be written to {self.folder}: {fault}"
        if needed or not self._wrote:
            raise ValueError(f"{message}; make room there and allow writing, or choose another out; then start again")
        self.say(f"{message}; make room there. The one before is kept, and training goes on until the next")

    def close(self) -> None:
        """Wait until nothing is being written, whatever came of it."""
        self._thread.shutdown()

    def _write(self, target: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        part = target.with_name(target.name + ".part")
        try:
            self._all(partial(_empty, part) if self.ranks.leads else list)
            distributed.write(part, tensors, self._group)
            files = self._all(lambda: [(path.name, path.stat().st_size, digest(path)) for path in self._mine(part)])
            facts["files"] = {name: [size, sum_] for name, size, sum_ in files}
            self._all(partial(self._appear, part, target, facts) if self.ranks.leads else list)
        except OSError:
            if self.ranks.leads:
                shutil.rmtree(part, ignore_errors=True)
            raise
        self._wrote = True

    def _mine(self, part: Path) -> list[Path]:
        """List the files that this rank has written."""
        return [*part.glob(f"__{self.ranks.rank}_*"), *(part.glob(".metadata") if self.ranks.leads else ())]

    def _appear(self, part: Path, target: Path, facts: Mapping[str, Any]) -> list[Any]:
        with (part / _FACTS).open("w", encoding="utf-8") as file:
            json.dump(facts, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
        for old in checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return []

    def _all(self, make: Callable[[], list[T]]) -> list[T]:
        """Bring together what the ranks make.

        Raises:
            OSError: one of them has failed; every rank raises it.
        """
        made: list[T] = []
        faults: list[str] = []
        try:
            made = make()
        except OSError as error:
            faults = [f"{error}"]
        if all_faults := self.ranks.gather(faults, self._group):
            raise OSError("; ".join(all_faults))
        return self.ranks.gather(made, self._group)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _host_memory(tensor: Tensor) -> Tensor:
    """Return memory of the host for a copy of a tensor, divided among the ranks alike."""
    part = _local(tensor)
    memory = torch.empty(part.shape, dtype=part.dtype)
    # Touched, so that no page is missing later; and not by torch, whose threads of OpenMP would be there once more for
    # the thread that calls this: where there are more than cores, all of them sleep between operations.
    memory.flatten().view(torch.uint8).numpy().fill(0)
    if not isinstance(tensor, DTensor):
        return memory
    return DTensor(memory, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(_local(tensor).shape), tensor.dtype


def _empty(part: Path) -> list[Any]:
    """Make an empty folder."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return []


def digest(path: Path) -> str:
    """Return a digest of a file's bytes: fast, against damage, not against malice."""
    sha1 = hashlib.sha1(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha1.update(chunk)
    return sha1.hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """List checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir() and not path.suffix)


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint holds beside tensors.

    Raises:
        ValueError: it is missing, or damaged.
    """
    try:
        facts: dict[str, Any] = json.loads((checkpoint / _FACTS).read_text("utf-8"))
        assert isinstance(facts["files"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{_FACTS} cannot be read, or names no files: {error}") from error
    return facts


def newest_whole(folder: Path, ranks: Ranks, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint whose files are all as they were written; ``None`` where there is no checkpoint.

    Damaged ones are named and put aside as ``step_N.damaged``. Every rank reads its share of the files.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    names = ranks.gather([path.name for path in checkpoints(folder)] if ranks.leads else [])
    damaged = []
    for name in reversed(names):
        faults = ranks.gather(_faults(folder / name, ranks.rank, ranks.size))
        if not faults:
            break
        damaged.append(f"{folder / name} is damaged: {'; '.join(dict.fromkeys(faults))}")
    else:
        if damaged:
            raise ValueError("\n".join([*damaged, f"no checkpoint is whole; to begin anew, remove {folder}"]))
        return None
    for fault, bad in zip(damaged, reversed(names)):
        say(f"{fault}; put aside as {bad}.damaged, going on from {name}")
        if ranks.leads:
            shutil.rmtree(folder / f"{bad}.damaged", ignore_errors=True)
            os.replace(folder / bad, folder / f"{bad}.damaged")
    return folder / name


def _faults(checkpoint: Path, rank: int, size: int) -> list[str]:
    """Say what is wrong with this rank's share of a checkpoint's files."""
    try:
        files: Mapping[str, Sequence[Any]] = read_facts(checkpoint)["files"]
    except ValueError as error:
        return [str(error)]
    found = []
    for name in sorted(files)[rank::size]:
        length, wanted = files[name]
        try:
            if (got := (checkpoint / name).stat().st_size) != length:
                found.append(f"{name} has {got} bytes, not {length}")
            elif digest(checkpoint / name) != wanted:
                found.append(f"{name} has other bytes than were written")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found
