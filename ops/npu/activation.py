"""SwiGLU by ``npu_swiglu``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from osum_npu import functional

from .dtypes import ALL


def _halves_of(gate: Tensor, up: Tensor) -> Tensor | None:
    """Return the tensor whose first half is ``gate`` and whose second half is ``up``, if there is one."""
    whole, width = gate._base, gate.shape[-1]
    if (
        whole is not None
        and whole is up._base
        and whole.is_contiguous()
        and whole.shape == (*gate.shape[:-1], 2 * width)
        and gate.stride() == up.stride() == whole.stride()
        and up.storage_offset() == gate.storage_offset() + width == whole.storage_offset() + width
    ):
        return whole
    return None


@functional.swiglu.impl("npu", dtypes=ALL, tolerance={torch.bfloat16: (6e-2, 6e-2), torch.float16: (1e-2, 1e-2)})
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """One kernel on the halves of a merged projection; separate tensors are not worth the copy that joins them."""
    whole = _halves_of(gate, up)
    return F.silu(gate) * up if whole is None else torch_npu.npu_swiglu(whole, dim=-1)
