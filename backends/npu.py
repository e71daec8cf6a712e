"""Huawei Ascend NPUs, by torch_npu."""

import os

import torch

from osum_npu.backend import Backend

_ALLOCATORS = ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Two names of one setting; torch_npu ends the process where both are set."""


def full_precision() -> None:
    """Compute float32 in float32: by default convolutions round their input to hf32."""
    torch.npu.matmul.allow_hf32 = False  # type: ignore[attr-defined]
    torch.npu.conv.allow_hf32 = False  # type: ignore[attr-defined]


NPU = Backend(
    name="npu",
    collective="hccl",
    visible="ASCEND_RT_VISIBLE_DEVICES",
    requires="torch_npu",
    ops="osum_npu_ops.npu",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    priority=20,
    env={
        "HCCL_CONNECT_TIMEOUT": "600",  # ranks of a large job start minutes apart
        "TASK_QUEUE_ENABLE": "2",
        "CPU_AFFINITY_CONF": "1",
        # variable lengths of speech fragment memory that is cut into fixed blocks
        **({} if any(name in os.environ for name in _ALLOCATORS) else {_ALLOCATORS[0]: "expandable_segments:True"}),
    },
    wake=full_precision,
    mend=(
        "Install CANN and source its set_env.sh, install the torch_npu of the same minor version as torch, and see "
        "that npu-smi info lists a device."
    ),
)
