"""Weights and inputs by formula: the same on every machine, so that only results need to be kept.

numpy's ``RandomState`` draws the same numbers in all its versions.
"""

from __future__ import annotations

import zlib
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def tensor(tag: str, *shape: int) -> Tensor:
    """Return standard normal numbers that follow from ``tag``, float32 ``[*shape]``."""
    rng = np.random.RandomState(zlib.crc32(tag.encode()))
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def integers(tag: str, below: int, count: int) -> list[int]:
    """Return ``count`` numbers in ``[0, below)`` that follow from ``tag``."""
    rng = np.random.RandomState(zlib.crc32(tag.encode()))
    return [int(i) for i in rng.randint(0, below, count)]


@torch.no_grad()
def fill(module: M, gain: float = 1.0) -> M:
    """Set all parameters by their names: matrices keep the size of what goes through, norms are near 1.

    Args:
        module: filled in place.
        gain: factor of the matrices.
    """
    for name, parameter in module.named_parameters():
        x = tensor(name, *parameter.shape)
        if name.endswith("bias"):
            parameter.copy_(0.05 * x)
        elif parameter.ndim == 1:
            parameter.copy_(1 + 0.1 * x)
        else:
            parameter.copy_(gain * x / parameter[0].numel() ** 0.5)
    return module
