"""The host."""

import ctypes
import platform
import sys
from collections.abc import Mapping

import torch

from osum_npu.backend import Backend

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of settings in glibc's malloc.h."""


def keep_memory() -> None:
    """Have glibc keep freed memory for the next tensor.

    By default it gives large blocks back to the system, which has to fill each new one with zeros, page by page: a
    quarter of the time of a small training. Other C libraries are left as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def multiplies_bfloat16() -> bool:
    """Say whether the processor has instructions for products of bfloat16.

    Without them torch computes such products number by number, some hundred times slower than those of float32.
    """
    if platform.machine() in ("x86_64", "AMD64"):  # oneDNN also takes AVX-512 without them, which gains nothing
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_device_supported())


def fastest() -> torch.dtype:
    """Return the dtype in which the processor trains fastest."""
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def diagnose() -> Mapping[str, str]:
    """Say what a training computes in by default."""
    has = "has" if multiplies_bfloat16() else "has no"
    return {"training": f"{str(fastest()).removeprefix('torch.')}, as the processor {has} instructions for bfloat16"}


CPU = Backend(
    name="cpu",
    collective="gloo",
    ops="osum_npu_ops.cpu",
    dtypes=(torch.float32, torch.bfloat16),
    fastest=fastest,
    diagnose=diagnose,
    # by default oneDNN keeps the kernels of 1024 shapes, fewer than a training with batches of many lengths goes round
    env={"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192"},
    wake=keep_memory,
)
