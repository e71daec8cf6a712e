"""NVIDIA GPUs."""

import torch

from osum_npu.backend import Backend


def full_precision() -> None:
    """Compute float32 in float32: by default convolutions round their input to TF32."""
    torch.backends.cudnn.allow_tf32 = False


CUDA = Backend(
    name="cuda",
    collective="nccl",
    visible="CUDA_VISIBLE_DEVICES",
    ops="osum_npu_ops.cuda",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    priority=10,
    wake=full_precision,
    mend="Install a CUDA build of torch and see that nvidia-smi lists a GPU.",
)
