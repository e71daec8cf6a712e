"""CPU: torch's flash attention, and bfloat16 without a detour through float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from osum_npu import functional

from . import sdpa

BOTH = (torch.float32, torch.bfloat16)

functional.attention.impl("cpu", dtypes=BOTH, tolerance=sdpa.TOLERANCE)(sdpa.attention)
functional.packed_attention.impl("cpu", dtypes=BOTH, tolerance=sdpa.TOLERANCE)(sdpa.packed_attention)


@functional.swiglu.impl("cpu", dtypes=(torch.bfloat16,), tolerance={torch.bfloat16: (6e-2, 6e-2)})
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Rounds once more than the reference, and moves half the bytes."""
    return F.silu(gate) * up
