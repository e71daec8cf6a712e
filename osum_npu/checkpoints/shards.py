"""Weights in safetensors files, read and written tensor by tensor, so that a model need not fit into memory.

Large weights are several files, ``model-00001-of-00003.safetensors`` and so on, with an index that says which tensor
lies where, as Hugging Face has them. The format (https://huggingface.co/docs/safetensors): eight bytes with the length
of the header, a JSON header with dtype, shape and byte range of each tensor, the bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers.utils import cached_file

from osum_npu.files import write_text

SHARD_BYTES = 4_000_000_000
"""Largest file; a single tensor may be larger."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the format."""


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, flat, as uint8; no copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def read_weights(name_or_path: str | Path, stem: str = "model", **settings: Any) -> dict[str, Tensor]:
    """Map the tensors of ``stem.safetensors``, or of its shards; their bytes are read when they are used.

    Args:
        name_or_path: folder, or name on a hub.
        stem: name of the file without its ending.
        settings: of the download.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        tensors: dict[str, Tensor] = {}
        for file, expected in _files(str(name_or_path), stem, settings).items():
            found = load_file(file)
            if lacking := [name for name in expected if name not in found]:
                raise KeyError(f"{Path(file).name} has no {lacking[0]}, which the index promises")
            tensors |= found
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{name_or_path}: {stem}.safetensors is missing or damaged: {error}") from error
    return tensors


def _files(name: str, stem: str, settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """List the files, with the names of the tensors that each must hold where an index says so."""
    try:
        return {cached_file(name, f"{stem}.safetensors", **settings): []}
    except OSError as missing:
        try:
            index = cached_file(name, f"{stem}.safetensors.index.json", **settings)
        except OSError:
            raise missing from None
    names: dict[str, list[str]] = {}
    for tensor, shard in json.loads(Path(index).read_text("utf-8"))["weight_map"].items():
        names.setdefault(shard, []).append(tensor)
    return {cached_file(name, shard, **settings): names[shard] for shard in sorted(names)}


def write_weights(folder: Path, stem: str, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write tensors one after the other into ``stem.safetensors``, or into shards where they are large.

    Older files of that stem in the folder are replaced.

    Args:
        folder: to write to.
        stem: name of the file without its ending.
        like: for each name a tensor of the shape and dtype to write; on device meta, or not yet read from a file.
        read: returns the values of one name; asked once for each.
    """
    # Wide dtypes first, so that each tensor lies at a multiple of its own width.
    names = sorted(like, key=lambda name: -like[name].element_size())
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        if shards[-1] and size + like[name].nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += like[name].nbytes
    total = sum(tensor.nbytes for tensor in like.values())
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": {}}
    with tqdm(total=total, desc=f"{stem}.safetensors", unit="B", unit_scale=True, delay=2) as bar:
        for number, shard in enumerate(shards, 1):
            ending = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"{stem}{ending}.safetensors"
            _write_file(folder / file, {name: like[name] for name in shard}, read, bar)
            index["weight_map"] |= dict.fromkeys(shard, file)
    written = {file}
    if len(shards) > 1:
        write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=1) + "\n")
        written = {f"{stem}.safetensors.index.json", *index["weight_map"].values()}
    for old in [*folder.glob(f"{stem}.safetensors*"), *folder.glob(f"{stem}-*-of-*.safetensors")]:
        if old.name not in written:
            old.unlink()


def _write_file(path: Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor], bar: Any) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in like.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in like.items():
            made = read(name)
            assert (made.shape, made.dtype) == (tensor.shape, tensor.dtype), name
            file.write(as_bytes(made).numpy().data)
            bar.update(tensor.nbytes)
    os.replace(part, path)


@contextmanager
def spooled(folder: Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> Iterator[dict[str, Tensor]]:
    """Keep computed tensors in a file of ``folder`` instead of in memory, as long as the context lasts."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".spool-") as place:
        if like:
            write_weights(Path(place), "spool", like, read)
        yield read_weights(place, "spool") if like else {}
