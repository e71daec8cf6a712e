"""Checkpoints of a running training: all that is needed to go on as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from osum_npu.data.loader import Position
from osum_npu.tasks import Utterance
from osum_npu.training.optimizer import Optimizers


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    stage: int = 0
    """Index of the stage under way."""
    stage_step: int = 0
    """Optimiser steps of that stage already done."""
    step: int = 0
    """Optimiser steps of the run already done."""
    position: Position = field(default_factory=Position)
    """Where that stage stands in its data."""


def save_state(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: Optimizers,
    device: torch.device,
    data: Mapping[str, str],
    keep: int,
) -> Path:
    """Write ``folder/step_N``; it appears whole or not at all. Older ones beyond ``keep`` are removed.

    Args:
        folder: of all checkpoints of the run.
        progress: how far it has come.
        model: whose weights are kept.
        optimizer: whose state is kept.
        device: whose random state is kept, beside the host's.
        data: what each source of the training data is known by (:func:`fingerprint`).
        keep: how many checkpoints stay.
    """
    target = folder / f"step_{progress.step:08d}"
    temporary = target.with_name(target.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    rng = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        rng["device"] = torch.get_device_module(device).get_rng_state(device)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng, "data": dict(data)}
    torch.save(state, temporary / "state.pt")
    (temporary / "progress.json").write_text(json.dumps(asdict(progress)), "utf-8")
    os.replace(temporary, target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """List whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.suffix != ".part" and path.is_dir())


def read_progress(checkpoint: Path) -> Progress:
    """Read how far a checkpoint's run had come."""
    fields = json.loads((checkpoint / "progress.json").read_text("utf-8"))
    return Progress(**{**fields, "position": Position(**fields["position"])})


def fingerprint(utterances: Sequence[Utterance]) -> str:
    """Return what training data is known by: how much there is, and a digest of all that is known about each."""
    digest = hashlib.blake2b(digest_size=8)
    for utterance in utterances:
        digest.update(repr(utterance).encode())
    return f"{len(utterances)} utterances, {digest.hexdigest()}"


def check_data(checkpoint: Path, state: Mapping[str, Any], data: Mapping[str, str]) -> None:
    """Make sure that a run goes on with the data that it began with: its position in another would mean nothing.

    Raises:
        ValueError: a source has changed; names each.
    """
    then: Mapping[str, str] = state.get("data", {})
    changed = [f"{n}: {then.get(n, 'unknown')} then; {data[n]} now" for n in data if then.get(n) != data[n]]
    if changed:
        raise ValueError(
            f"the training data has changed since {checkpoint}: {' | '.join(changed)}; put back what was there, or "
            "choose another out"
        )


def load_tensors(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's weights, optimiser and random states.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(
            f"{checkpoint / 'state.pt'} cannot be read ({error}); remove that folder to go on from the one before"
        ) from error
    return state


def restore_rng(rng: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set the random states."""
    torch.set_rng_state(rng["cpu"])
    if device.type != "cpu" and "device" in rng:
        torch.get_device_module(device).set_rng_state(rng["device"], device)
