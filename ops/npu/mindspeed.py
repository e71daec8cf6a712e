"""MindSpeed's operators, behind those of torch_npu: they compute where ``OSUM_OPS`` names them.

MindSpeed is installed from its source, and compiles some operators at first use, so a first tiny call is part of the
question whether it can run. Its ``megatron_adaptor`` is never imported: it rewrites torch.
Source: Ascend/MindSpeed 0.12, ``mindspeed/ops``.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from osum_npu import functional

from .attention import CAUSAL, TOLERANCE, compressed_mask
from .dtypes import ALL


def _operator(module: str, name: str) -> Any:
    return getattr(import_module(f"mindspeed.ops.{module}"), name)


@cache
def attention_unavailable() -> str:
    """Say why MindSpeed's attention cannot run; empty where it can."""
    try:
        x = torch.zeros(1, 1, 1, 16, dtype=torch.float16, device="npu")
        attention(x, x, x)
    except Exception as fault:  # a missing package, a failed compilation, a missing library of CANN
        return f"{type(fault).__name__}: {fault}. Install MindSpeed from its source: pip install -e MindSpeed"
    return ""


@cache
def rotary_unavailable() -> str:
    """Say why MindSpeed's rotary positions cannot run; empty where they can."""
    try:
        x = torch.zeros(1, 1, 1, 64, dtype=torch.float16, device="npu")
        rotary(x, x[:, :, 0], x[:, :, 0])
    except Exception as fault:
        return f"{type(fault).__name__}: {fault}. Install MindSpeed from its source: pip install -e MindSpeed"
    return ""


def _accepts(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    *,
    causal: bool = False,
    mask_BTS: Tensor | None = None,
    scale: float | None = None,  # noqa: ARG001  an op's accepts has its parameters
) -> bool:
    """No mask but the causal one, and for that no more queries than keys; one dtype."""
    same = query_BTHD.dtype == key_BSKD.dtype == value_BSKD.dtype
    return same and mask_BTS is None and not (causal and query_BTHD.shape[1] > key_BSKD.shape[1])


@functional.attention.impl(
    "npu",
    provider="mindspeed",
    dtypes=ALL,
    accepts=_accepts,
    tolerance=TOLERANCE,
    unavailable=attention_unavailable,
)
def attention(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    *,
    causal: bool = False,
    mask_BTS: Tensor | None = None,  # noqa: ARG001
    scale: float | None = None,
) -> Tensor:
    """MindSpeed's fusion attention."""
    H, D = query_BTHD.shape[2:]
    settings = {"atten_mask": compressed_mask(query_BTHD.device), "sparse_mode": CAUSAL} if causal else {}
    out: Tensor = _operator("fusion_attention_v2", "npu_fusion_attention")(
        query_BTHD, key_BSKD, value_BSKD, H, "BSND", scale=D**-0.5 if scale is None else scale, **settings
    )[0]
    return out


@functional.rotary.impl("npu", provider="mindspeed", dtypes=ALL, unavailable=rotary_unavailable)
def rotary(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """MindSpeed's rotary positions, in the pairing of LLaMA."""
    cos, sin = (angle.to(x_BTHD.dtype).unsqueeze(2) for angle in (cos_BTD, sin_BTD))
    turned: Tensor = _operator("npu_rotary_position_embedding", "npu_rotary_position_embedding")(x_BTHD, cos, sin, 0)
    return turned
