"""The host."""

import torch

from osum_npu.backend import Backend

CPU = Backend(name="cpu", collective="gloo", ops="osum_npu_ops.cpu", dtypes=(torch.float32, torch.bfloat16))
