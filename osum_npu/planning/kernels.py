"""Stand-ins for fused kernels of a device that is not here: they keep and move what a fused kernel would.

Their results mean nothing. Without them a plan would count the references of ``osum_npu.functional``, which are many
small operators and keep all that lies between them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from osum_npu import op
from osum_npu.op import REGISTRY, Implementation

_PROVIDER = "plan"


class _Kernel(torch.autograd.Function):
    """Reads one tensor, writes one of its shape, keeps what is given for the backward pass, and itself where asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: bool, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*([x] if keep else []), *kept)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        kept = ctx.saved_tensors[-len(needed) :]
        return gradient.clone(), None, *(torch.empty_like(x) if want else None for x, want in zip(kept, needed))


def _attention(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    *,
    causal: bool = False,
    mask_BTS: Tensor | None = None,  # noqa: ARG001  a kernel reads it without keeping it
    scale: float | None = None,
) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query_BTHD, key_BSKD, value_BSKD))
    grouped = query.shape[1] != key.shape[1]
    out_BHTD = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out_BHTD.transpose(1, 2)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ARG001
    out: Tensor = _Kernel.apply(x, True, weight)  # type: ignore[no-untyped-call]
    return out


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return _rms_norm(total, weight, eps), total


def _rotary(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    out: Tensor = _Kernel.apply(x_BTHD, False, cos_BTD, sin_BTD)  # type: ignore[no-untyped-call]
    return out


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out: Tensor = _Kernel.apply(gate, True, up)  # type: ignore[no-untyped-call]
    return out


_STAND_INS: dict[str, Any] = {
    "attention": _attention,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rotary": _rotary,
    "swiglu": _swiglu,
}


@contextmanager
def kernels(fused: Collection[str]) -> Iterator[None]:
    """Compute the ops named by stand-ins, all others by their references."""
    with op.references():
        for name in fused:
            REGISTRY[name].implementations[_PROVIDER] = Implementation(_PROVIDER, "", _STAND_INS[name])
            REGISTRY[name].forced = _PROVIDER
        try:
            yield
        finally:
            for name in fused:
                del REGISTRY[name].implementations[_PROVIDER]
