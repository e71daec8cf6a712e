"""Dtypes of the fused operators."""

import torch

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32)
