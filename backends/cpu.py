"""The host."""

import ctypes
import sys

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


CPU = Backend(
    name="cpu",
    collective="gloo",
    ops="osum_npu_ops.cpu",
    dtypes=(torch.float32, torch.bfloat16),
    # by default oneDNN keeps the kernels of 1024 shapes, fewer than a training with batches of many lengths goes round
    env={"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192"},
    wake=keep_memory,
)
