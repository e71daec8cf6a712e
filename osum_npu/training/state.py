"""What a checkpoint of a running training holds: all that is needed to go on as if nothing had happened.

Weights that the stages so far have trained, at a stage's end also what the next one will, optimiser states, random
states of every rank; of all other weights, where they come from and a digest. Tensors are named ``model.NAME``,
``optimizer.I.NAME.STATE`` and ``rng.RANK.DEVICE``. Buffers are constants of the models here, and not kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from osum_npu.checkpoints import distributed
from osum_npu.checkpoints.shards import as_bytes
from osum_npu.config import NewModel, PretrainedLLM, Recipe
from osum_npu.data.loader import Position
from osum_npu.tasks import Utterance
from osum_npu.training.optimizer import Optimizers, part_of
from osum_npu.training.ranks import Ranks
from osum_npu.training.saver import read_facts


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


def read_progress(checkpoint: Path) -> Progress:
    """Read how far a checkpoint's run had come.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    fields = read_facts(checkpoint)["progress"]
    return Progress(**{**fields, "position": Position(**fields["position"])})


def facts(progress: Progress, ranks: Ranks, data: Mapping[str, str], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint holds beside tensors.

    Args:
        progress: how far the run has come.
        ranks: of the run.
        data: what each source of the training data is known by (:func:`fingerprint`).
        frozen: what each part that no stage has trained yet is known by (:func:`frozen_parts`).
    """
    return {"progress": asdict(progress), "ranks": ranks.size, "data": dict(data), "frozen": dict(frozen)}


def tensors(model: nn.Module, trained: Collection[str], optimizer: Optimizers, ranks: Ranks) -> dict[str, Tensor]:
    """Return this rank's part of what a checkpoint holds; nothing is copied.

    Args:
        model: sharded or not.
        trained: parts of it that the stages so far have trained.
        optimizer: of the stage under way.
        ranks: which share the writing of what is not sharded.
    """
    kept = {f"model.{name}": p.detach() for name, p in model.named_parameters() if part_of(name) in trained}
    for number, (one, names) in enumerate(_by_name(optimizer, model)):
        states = {names[i]: state for i, state in one.state_dict()["state"].items()}
        numbers: dict[str, list[Any]] = {}
        for name in sorted(states):
            for key, value in states[name].items():
                if isinstance(value, Tensor) and value.ndim:
                    kept[f"optimizer.{number}.{name}.{key}"] = value
                else:
                    numbers.setdefault(key, []).append(value)
        for key, values in numbers.items():
            kept[f"optimizer.{number}.{key}"] = torch.stack([torch.as_tensor(value) for value in values])
    shared = [name for name, tensor in kept.items() if not isinstance(tensor, DTensor)]
    for name in set(shared) - set(shared[ranks.rank :: ranks.size]):
        del kept[name]
    kept[f"rng.{ranks.rank}.cpu"] = torch.get_rng_state()
    if ranks.device.type != "cpu":
        kept[f"rng.{ranks.rank}.device"] = torch.get_device_module(ranks.device).get_rng_state(ranks.device)
    return kept


def restore_weights(checkpoint: Path, model: nn.Module, ranks: Ranks) -> None:
    """Set the weights that a checkpoint holds.

    Raises:
        ValueError: it cannot be read.
    """
    held = distributed.describe(checkpoint)
    into = {f"model.{name}": p.detach() for name, p in model.named_parameters() if f"model.{name}" in held}
    distributed.read(checkpoint, into, ranks.readers)


def restore_optimizer(checkpoint: Path, optimizer: Optimizers, model: nn.Module, ranks: Ranks) -> None:
    """Set the optimiser of the stage under way.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    held = distributed.describe(checkpoint)
    parameters = dict(model.named_parameters())
    into: dict[str, Tensor] = {}
    for number, (_, names) in enumerate(_by_name(optimizer, model)):
        for key in (key for key in held if key.startswith(f"optimizer.{number}.")):
            name, _, _ = key.removeprefix(f"optimizer.{number}.").rpartition(".")
            like = parameters.get(name)
            assert name in names or not name
            dtype = held[key].properties.dtype
            into[key] = (
                torch.empty(held[key].size, dtype=dtype) if like is None else torch.zeros_like(like, dtype=dtype)
            )
    distributed.read(checkpoint, into, ranks.readers)
    for number, (one, names) in enumerate(_by_name(optimizer, model)):
        states: dict[str, dict[str, Any]] = {}
        numbers: dict[str, Tensor] = {}
        for key in (key for key in into if key.startswith(f"optimizer.{number}.")):
            name, _, state = key.removeprefix(f"optimizer.{number}.").rpartition(".")
            if name:
                states.setdefault(name, {})[state] = into[key]
            else:
                numbers[state] = into[key]
        for state, values in numbers.items():
            for name, value in zip(sorted(states), values):
                states[name][state] = value if value.is_floating_point() else int(value)
        places = {name: i for i, name in enumerate(names)}
        groups = one.state_dict()["param_groups"]
        one.load_state_dict({"state": {places[name]: states[name] for name in states}, "param_groups": groups})


def restore_rng(checkpoint: Path, ranks: Ranks) -> None:
    """Set the random states: this rank's own, or another's where the run had fewer ranks.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    held = distributed.describe(checkpoint)
    prefix = f"rng.{ranks.rank % read_facts(checkpoint)['ranks']}."
    into = {key: torch.empty(held[key].size, dtype=torch.uint8) for key in held if key.startswith(prefix)}
    distributed.read(checkpoint, into, ranks.readers)
    torch.set_rng_state(into[f"{prefix}cpu"])
    if f"{prefix}device" in into and ranks.device.type != "cpu":
        torch.get_device_module(ranks.device).set_rng_state(into[f"{prefix}device"], ranks.device)


def _by_name(optimizer: Optimizers, model: nn.Module) -> list[tuple[torch.optim.Optimizer, list[str]]]:
    """Return each optimiser with the names of its parameters, in the order of its state dict."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(one, [names[id(p)] for group in one.param_groups for p in group["params"]]) for one in optimizer.all]


def fingerprint(utterances: Sequence[Utterance]) -> str:
    """Return what training data is known by: how much there is, and a digest of all that is known about each."""
    digest = hashlib.blake2b(digest_size=8)
    for utterance in utterances:
        digest.update(repr(utterance).encode())
    return f"{len(utterances)} utterances, {digest.hexdigest()}"


def frozen_parts(model: nn.Module, recipe: Recipe, ranks: Ranks) -> dict[str, str]:
    """Return what each part is known by that the first stage does not train: its source, and a digest of its bytes.

    Computed once, on the host, before weights are divided: each rank reads its share of the tensors, on all its cores.

    Args:
        model: whole, the same on every rank.
        recipe: of the run.
        ranks: of the run.
    """
    parts: dict[str, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if part_of(name) not in recipe.stages[0].trainable:
            parts.setdefault(part_of(name), []).append((name, parameter))
    mine = [pair for pairs in parts.values() for pair in pairs][ranks.rank :: ranks.size]
    with ThreadPoolExecutor() as threads:
        digests = dict(ranks.gather(list(zip([name for name, _ in mine], threads.map(_digest, [t for _, t in mine])))))
    known = {}
    for part, pairs in parts.items():
        together = hashlib.sha1("".join(f"{name} {digests[name]}\n" for name, _ in pairs).encode())
        known[part] = f"{_source(recipe, part)}, {together.hexdigest()}"
    return known


def _digest(tensor: Tensor) -> str:
    return hashlib.sha1(as_bytes(tensor).numpy().data, usedforsecurity=False).hexdigest()


def _source(recipe: Recipe, part: str) -> str:
    """Say where a part's first weights come from."""
    path = getattr(recipe.model, "path", None)
    if isinstance(recipe.model, NewModel):
        llm = recipe.model.llm.path if isinstance(recipe.model.llm, PretrainedLLM) else None
        path = {"llm": llm, "encoder": recipe.model.encoder_weights}.get(part)
    return path or f"random by seed {recipe.seed}"


def check_unchanged(checkpoint: Path, data: Mapping[str, str], frozen: Mapping[str, str]) -> None:
    """Make sure that a run goes on with the data and the untrained weights that it began with.

    Raises:
        ValueError: a source or a part has changed; names each.
    """
    then = read_facts(checkpoint)
    for what, before, now in (
        ("the training data has", then.get("data", {}), {name: data[name] for name in data}),
        ("weights that are not trained have", then.get("frozen", {}), {n: frozen[n] for n in then.get("frozen", {})}),
    ):
        changed = [f"{n}: {before.get(n, 'unknown')} then; {now[n]} now" for n in now if before.get(n) != now[n]]
        if changed:
            raise ValueError(
                f"{what} changed since {checkpoint}: {' | '.join(changed)}; put back what was there, or choose "
                "another out"
            )
