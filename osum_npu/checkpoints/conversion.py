"""What every import of another system's checkpoint needs: complaints about its keys, and its LLM."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from osum_npu.checkpoints.shards import as_bytes, read_weights
from osum_npu.models.tokenizer import load_tokenizer

_CHUNK = 2**24
"""Numbers that are compared at once."""


def misfits(
    found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], optional: Collection[str] = ()
) -> list[str]:
    """Say what is wrong with the keys of a checkpoint, a line for each.

    Args:
        found: the checkpoint.
        wanted: shapes by key.
        optional: keys that may be there or not, of any shape where ``wanted`` does not name it.
    """
    missing = [key for key in wanted if key not in found and key not in optional]
    faults = [f"{key} is missing: wanted {_form(wanted[key])}" for key in missing]
    for key, tensor in found.items():
        if key not in wanted and key not in optional:
            close = difflib.get_close_matches(key, missing, 1, 0.9)
            hint = f"; is it {close[0]}?" if close else ""
            faults.append(f"{key}, {_form(tensor.shape)}, is unknown: wanted no such tensor{hint}")
        elif key in wanted and tuple(tensor.shape) != wanted[key]:
            faults.append(f"{key} is {_form(tensor.shape)}: wanted {_form(wanted[key])}")
        elif not tensor.is_floating_point():
            faults.append(f"{key} is {str(tensor.dtype).removeprefix('torch.')}: wanted floating-point numbers")
    return faults


def _form(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    shared = (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride())
    return shared or torch.equal(as_bytes(one), as_bytes(other))


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, each of which both dtypes can express."""
    if one.dtype == other.dtype or one.shape != other.shape:
        return same_bits(one, other)
    return all(
        same_bits(a, b.to(a.dtype)) and same_bits(a.to(b.dtype), b)
        for a, b in zip(torch.split(one.reshape(-1), _CHUNK), torch.split(other.reshape(-1), _CHUNK))
    )


def lies_in(llm: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the folder or hub name of an LLM holds these tensors, with the same values."""
    try:
        stored = read_weights(llm)
    except ValueError:
        return False
    return all(name in stored and same_values(tensor, stored[name]) for name, tensor in tensors.items())


def read_llm_config(llm: str) -> dict[str, Any]:
    """Read the configuration of an LLM, without the dtype of its files.

    Raises:
        ValueError: there is no LLM of that name.
    """
    from osum_npu.models.llm import read_config

    try:
        config: dict[str, Any] = read_config(llm).to_dict()
    except Exception as error:  # transformers raises many kinds
        raise ValueError(
            f"the LLM {llm!r} has no configuration that can be read: {error}; wanted a folder with config.json and a "
            "tokenizer, or a name on a hub"
        ) from error
    for dtype in ("dtype", "torch_dtype"):
        config.pop(dtype, None)
    return config


def read_tokenizer(llm: str) -> Any:
    """Load the tokenizer of an LLM.

    Raises:
        ValueError: it has none.
    """
    try:
        tokenizer = load_tokenizer(llm)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes one up without files
            raise ValueError("its vocabulary is empty; is tokenizer.json there?")
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"the LLM {llm!r} has no tokenizer that can be read: {error}") from error
    return tokenizer
