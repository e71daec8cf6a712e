"""Checkpoints of OSUM, OSUM-EChat and OSUM-Pangu: into a model directory, and back.

A reference file is one state dict with everything in it, the base LLM too. A model directory made from it has two more
files than others: ``unused.safetensors`` with what this project's models do not compute with (codec embeddings, a head
for speech tokens, a norm, position tables), and ``reference.json`` with keys and dtypes. With them the file can be
written again, every tensor bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osum_npu import __version__
from osum_npu.checkpoints.conversion import lies_in, read_llm_config, read_tokenizer
from osum_npu.checkpoints.model_directory import replacement, write_companions
from osum_npu.checkpoints.osum_keys import OWN_POSITIONS, SPEECH_HEADS, is_pangu, own_name, without_lora
from osum_npu.checkpoints.osum_sizes import copied_keys, find_faults, read_sizes
from osum_npu.checkpoints.shards import DTYPES, read_weights, spooled, write_weights
from osum_npu.checkpoints.sidecar import read_sidecar
from osum_npu.checkpoints.torch_file import read_torch_file, write_torch_file
from osum_npu.models.lora import is_lora, updated
from osum_npu.models.speech_llm import SpeechLLMConfig, peft_name, write_model
from osum_npu.models.whisper import sinusoids

RECORD = "reference.json"


def import_osum(
    source: Path,
    folder: Path,
    llm: str,
    *,
    merge: bool = False,
    encoder_heads: int | None = None,
    adapter_heads: int = 4,
    lora_alpha: float | None = None,
) -> SpeechLLMConfig:
    """Write a model directory from a reference checkpoint, tensor by tensor.

    Sizes are read from the shapes. The base LLM is stored by reference where ``llm`` holds the same numbers, and inside
    otherwise.

    Args:
        source: the ``.pt`` file; a sidecar ``.yaml`` beside it is heeded and kept.
        folder: to write; must not exist yet, or be empty.
        llm: folder or hub name of the base LLM; gives its configuration and tokenizer.
        merge: fold LoRA into the LLM and store the LLM inside.
        encoder_heads: attention heads of the encoder; by default the sidecar's, else as many as are 64 wide.
        adapter_heads: attention heads of the adapter, which no file tells.
        lora_alpha: by default the sidecar's, else 32.

    Returns:
        The configuration of the model written.

    Raises:
        ValueError: the file cannot be read or is no such checkpoint; with a line for every key that does not fit.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: choose another folder, or remove it")
    llm = str(Path(llm).resolve()) if Path(llm).is_dir() else llm
    state, sidecar = read_torch_file(source), read_sidecar(source)
    if not any(map(own_name, state)):
        raise ValueError(
            f"{source} is no checkpoint of OSUM: wanted keys such as encoder.embed.conv.0.weight, "
            f"got {next(iter(state))}"
        )
    config = read_sizes(state, sidecar, read_llm_config(llm), encoder_heads, adapter_heads, lora_alpha)
    copies = copied_keys(state, tied=config.llm.get("tie_word_embeddings", False))
    if faults := find_faults(state, copies, config):
        raise ValueError("\n".join([f"{source} does not fit OSUM with the LLM {llm}:", *faults]))
    tokenizer = read_tokenizer(llm)
    if is_pangu(state):
        config.form = "osum_pangu"
        # its training encodes the fixed texts as a plain call does, and all others without special tokens
        config.begin_of_text = "fixed" if tokenizer("").input_ids else "none"
    else:
        end = next(mark for head, mark in SPEECH_HEADS.items() if f"{head}.weight" in state)
        if end in tokenizer.get_vocab():
            tokenizer.eos_token = end

    ours, unused = _split({key: tensor for key, tensor in state.items() if key not in copies})
    ours[OWN_POSITIONS] = sinusoids(config.encoder["max_frames"], config.encoder["width"])
    record = {key: DTYPES[tensor.dtype] for key, tensor in state.items()}
    updates: dict[str, tuple[Tensor, Tensor]] = {}
    scale = 0.0 if config.lora is None else config.lora["alpha"] / config.lora["rank"]
    base = {name: tensor for name, tensor in ours.items() if name.startswith("llm.") and not is_lora(name)}
    if merge:
        ours, updates = _merge(ours)
        record = {without_lora(key): dtype for key, dtype in record.items() if not is_lora(key)}
        copies = {without_lora(key): without_lora(original) for key, original in copies.items()}
        config.lora = None
    elif lies_in(llm, {name.removeprefix("llm.").replace(".base_layer", ""): base[name] for name in base}):
        ours = {name: tensor for name, tensor in ours.items() if name not in base}
        config.llm, config.llm_path = {}, llm

    with replacement(folder) as temporary:
        write_model(
            temporary,
            config,
            ours,
            lambda name: updated(ours[name], *updates[name], scale) if name in updates else ours[name],
        )
        write_weights(temporary, "unused", unused, unused.__getitem__)
        content = {"source": source.name, "tensors": record, "copies": copies, "sidecar": sidecar}
        (temporary / RECORD).write_text(json.dumps(content, ensure_ascii=False, indent=1, default=str) + "\n", "utf-8")
        system = "OSUM-Pangu" if config.form == "osum_pangu" else "OSUM"
        write_companions(
            temporary, tokenizer, config.encoder["n_mels"], _card(source, system, llm, sidecar, merge=merge)
        )
    return config


def export_osum(folder: Path, target: Path, llm: str | None = None) -> None:
    """Write the reference checkpoint that a model directory was made from, with the weights that it has now.

    Args:
        folder: a model directory with ``reference.json`` and ``unused.safetensors``.
        target: the ``.pt`` file to write.
        llm: where the base LLM lies, if not where the model directory says.

    Raises:
        ValueError: the folder was not made from such a checkpoint, or lacks a tensor of it.
    """
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no {RECORD} that can be read, so it was not made from a checkpoint of OSUM: {error}; a "
            f"model trained from such a directory needs {RECORD} and unused.safetensors copied from there"
        ) from error
    originals = {key: key for key in record["tensors"]}
    for key, original in record["copies"].items():
        originals[key] = record["copies"].get(original, original)
    found = _stored(folder, llm)
    tensors = {key: tensor for key in dict.fromkeys(originals.values()) if (tensor := found(key)) is not None}
    if lacking := [key for key in originals.values() if key not in tensors]:
        raise ValueError("\n".join([f"{folder} lacks what these keys of the checkpoint are made of:", *lacking]))
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    other = {
        key: torch.empty(tensor.shape, dtype=dtypes[record["tensors"][key]], device="meta")
        for key, tensor in tensors.items()
        if DTYPES[tensor.dtype] != record["tensors"][key]
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with spooled(target.parent, other, lambda key: tensors[key].to(other[key].dtype)) as cast:
        tensors |= cast
        write_torch_file({key: tensors[original] for key, original in originals.items()}, target)


def _stored(folder: Path, llm: str | None) -> Callable[[str], Tensor | None]:
    """Return what finds a reference tensor in a model directory, by its key."""
    config = SpeechLLMConfig.from_pretrained(folder)
    found, unused = read_weights(folder), read_weights(folder, "unused")
    if config.lora is not None:
        found |= read_weights(folder, "adapter_model")
    if config.llm_path is not None:
        found = {f"llm.{name}": tensor for name, tensor in read_weights(llm or config.llm_path).items()} | found

    def find(key: str) -> Tensor | None:
        name = own_name(key)
        if name is None:
            return unused.get(key)
        if name == "marks":
            return torch.cat([unused[key], found[name]]) if key in unused and name in found else None
        places = (name, peft_name(name), name.replace(".base_layer", ""))
        return next((found[place] for place in places if place in found), None)

    return find


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide into this project's tensors, by their own names, and unused ones, by the reference's keys."""
    ours, unused = {}, {}
    for key, tensor in state.items():
        name = own_name(key)
        if name is None:
            unused[key] = tensor
        elif name == "marks":
            ours[name], unused[key] = tensor[-2:], tensor[:-2]
        else:
            ours[name] = tensor
    return ours, unused


def _merge(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Name tensors as a model without LoRA does; beside them, by the same names, the updates that LoRA holds."""
    kept, updates = {}, {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".base_layer.weight")
        if module != name:
            updates[f"{module}.weight"] = (
                tensors[f"{module}.lora_A.default.weight"],
                tensors[f"{module}.lora_B.default.weight"],
            )
        if not is_lora(name):
            kept[name.replace(".base_layer", "")] = tensor
    return kept, updates


def _card(source: Path, system: str, llm: str, sidecar: Mapping[str, Any], *, merge: bool) -> str:
    """Write ``README.md`` of the model directory."""
    settings = {name: sidecar[name] for name in ("tag", "step", "epoch", "save_time") if name in sidecar}
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"""---
library_name: osum-npu
pipeline_tag: automatic-speech-recognition
tags: [speech, speech-llm]
---

# A speech-understanding model

Converted by osum-npu {__version__} from `{source.name}`, a checkpoint of {system}{f" ({told})" if told else ""}.
Base LLM: `{Path(llm).name if Path(llm).is_dir() else llm}`{", LoRA folded in" if merge else ""}.

```sh
osum-npu infer --model THIS_FOLDER --tasks asr recording.wav
```
"""
