"""NVIDIA GPUs."""

import torch

from osum_npu.backend import Backend

CUDA = Backend(
    name="cuda",
    collective="nccl",
    visible="CUDA_VISIBLE_DEVICES",
    ops="osum_npu_ops.cuda",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    priority=10,
    mend="Install a CUDA build of torch and see that nvidia-smi lists a GPU.",
)
